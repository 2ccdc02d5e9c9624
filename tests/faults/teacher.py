"""A server in place of a teacher: what it says is a function of the prompt, and it can misbehave."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import listening

MODEL = "oracle"
REVISION = "0123456789abcdef0123456789abcdef01234567"
URL_ENV = "FAULTS_TEACHER"
FAULTS = ("dead", "silent", "half", "other ids", "unsteady", "no distribution")
"""Ways to misbehave: no answer at all, none to this request, one that breaks off, one about another prompt,
another one each time, and probabilities of more than one.
"""


class Oracle:
    """The server.

    Attributes:
        url: Its address.
        fault: One of `FAULTS`, or "".
        after: Answers that are right before it begins to misbehave.
        asked: Answers given since `misbehave`.
    """

    def __init__(self) -> None:
        self.url = ""
        self.behave()

    def behave(self) -> None:
        """Answer what is right."""
        self.fault, self.after, self.asked = "", 0, 0

    def misbehave(self, fault: str, after: int) -> None:
        """Misbehave after some answers."""
        self.fault, self.after, self.asked = fault, after, 0

    def answer(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        """Return what vLLM would say of some prompts."""
        topk = body["prompt_logprobs"]
        choices = []
        for number, prompt in enumerate(body["prompt"]):
            entries: list[dict[str, Any] | None] = [None]
            for place in range(1, len(prompt)):
                entries.append(_entry(prompt[: place + 1], topk, fault))
            ids = [*prompt[:-1], prompt[-1] ^ 1] if fault == "other ids" else list(prompt)
            choice = {"index": number, "text": "x", "finish_reason": "length", "logprobs": None}
            choices.append(choice | {"prompt_logprobs": entries, "prompt_token_ids": ids})
        return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": choices}


def _entry(prompt: list[int], topk: int, fault: str) -> dict[str, Any]:
    """Return K ids and the token itself with log-probabilities that the last few tokens decide."""
    draw = random.Random(repr(prompt[-8:]))
    # Halves of halves: the K likeliest have less than all of the mass, and the token itself comes after them.
    found = {token: -1.0 - rank for rank, token in enumerate(draw.sample(range(1000, 190_000), topk))}
    found[prompt[-1]] = -8.0 - 6.0 * draw.random()
    if fault == "unsteady":
        found[prompt[-1]] -= 9.0 * random.random()
    if fault == "no distribution":
        found = dict.fromkeys(found, 0.0)
    return {
        str(token): {"logprob": said, "rank": rank, "decoded_token": "x"}
        for rank, (token, said) in enumerate(found.items(), start=1)
    }


@contextmanager
def serving() -> Iterator[Oracle]:
    """Serve on loopback, at a port of its own, while the block runs."""
    oracle, lock = Oracle(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, document: dict[str, Any], *, whole: bool = True) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if whole else content[: len(content) // 2])
            self.close_connection = self.close_connection or not whole

        def do_GET(self) -> None:
            if oracle.fault == "dead":
                self.close_connection = True
                return
            self.send({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                oracle.asked += 1
                fault = oracle.fault if oracle.asked > oracle.after else ""
            if fault in ("dead", "silent"):
                self.close_connection = True
                return
            self.send(oracle.answer(body, fault), whole=fault != "half")

    with listening(Handler) as address:
        oracle.url = f"{address}/v1"
        yield oracle
