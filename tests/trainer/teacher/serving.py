"""A completion endpoint on loopback that computes with a real model, and misbehaves as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np

from tests.loopback import listening
from tests.trainer.teacher.teachers import module_logits
from trainer.teacher.descriptor import Descriptor

MODEL = "tiny"
KEY = "sk-not-for-any-log"
DESCRIPTOR = Descriptor(MODEL, "1a2b3c", "high", "0" * 64, url_env="TINY_URLS")


class Served:
    """One replica.

    Attributes:
        url: Its address.
        requests: Bodies of the completions that were asked of it.
        headers, path: Of the last of them.
        faults: What happens to the coming requests, first to last; afterwards it behaves.
        style: What it knows: `prompt_logprobs`, or `echo` alone.
        change: Applied to every answer.
    """

    def __init__(self, module: Any, *, style: str = "prompt_logprobs", shift: float = 0.0) -> None:
        self.module, self.style, self.shift = module, style, shift
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.path = ""
        self.faults: list[str] = []
        self.change: Callable[[dict[str, Any]], None] = lambda _: None
        self.url = ""
        self._lock = threading.Lock()

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        logits = module_logits(self.module, tokens).astype(np.float64)
        logprobs = logits - logits.max(axis=1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        if self.shift:  # other weights, as it were
            noise = np.random.default_rng(len(tokens)).normal(0, self.shift, size=logprobs.shape)
            logprobs = logprobs + noise
            logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        return logprobs

    def choice(self, index: int, tokens: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """What vLLM says of one prompt."""
        logprobs = self.logprobs(tokens)
        topk = body.get("prompt_logprobs", body.get("logprobs")) or 0
        entries: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(tokens[1:]):
            row = logprobs[place]
            ranks = np.argsort(np.argsort(-row, kind="stable"), kind="stable") + 1
            listed = {int(i) for i in np.flatnonzero(ranks <= topk)} | {token}
            entries.append(
                {
                    str(i): {"logprob": float(row[i]), "rank": int(ranks[i]), "decoded_token": "x"}
                    for i in listed
                }
            )
        made: dict[str, Any] = {"index": index, "text": "x", "finish_reason": "length", "logprobs": None}
        if self.style == "prompt_logprobs" and "prompt_logprobs" in body:
            made |= {"prompt_logprobs": entries, "prompt_token_ids": list(tokens)}
        elif body.get("echo"):
            own = [None] + [
                entry[str(t)]["logprob"] for entry, t in zip(entries[1:], tokens[1:], strict=True)
            ]
            best = [
                None if entry is None else {f"token_id:{i}": said["logprob"] for i, said in entry.items()}
                for entry in entries
            ]
            made["logprobs"] = {
                "tokens": [f"token_id:{t}" for t in (*tokens, 7)],
                "token_logprobs": [*own, -1.0],
                "top_logprobs": [*best, {"token_id:7": -1.0}],
                "text_offset": [0] * (len(tokens) + 1),
            }
        return made

    def fault(self, body: dict[str, Any]) -> str:
        """What happens to a request."""
        return self.faults.pop(0) if self.faults else ""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            choices = [self.choice(n, tokens, body) for n, tokens in enumerate(body["prompt"])]
        document = {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": choices[::-1]}
        self.change(document)
        return document


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(
            self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            entry = {"id": MODEL, "object": "model", "max_model_len": 200}
            self.send(json.dumps({"object": "list", "data": [entry]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body)
            served.headers, served.path = dict(self.headers), self.path
            fault = served.fault(body)
            if fault.isdigit():
                self.send(
                    b'{"error": {"message": "logprobs: no more than 5"}}', int(fault), Retry_After="0.01"
                )
                return
            if fault == "html":
                self.send(b"<html>Please log in</html>", kind="text/html")
                return
            if fault == "hang up":
                self.close_connection = True
                return
            if fault == "stall":
                time.sleep(3.0)
                self.close_connection = True
                return
            content = json.dumps(served.answer(body)).encode()
            self.send(content[: len(content) // 2] if fault == "half" else content)

    return Handler


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    with listening(_handler(served)) as served.url:
        yield served
