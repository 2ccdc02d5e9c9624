"""A teacher behind an OpenAI-compatible completion endpoint, as vLLM serves them.

A request holds several prompts as token ids and asks for `prompt_logprobs`; a server that does not know this
key is asked with `echo` and `logprobs` instead. Either way the ids that come back are compared with those
that were sent, for every token that is read.
"""

import logging
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit
from weakref import WeakSet

import httpx

from trainer.contract.surroundings import surroundings
from trainer.errors import TeacherError
from trainer.teacher.answers import Style, UnusableAnswerError, body_of, parse
from trainer.teacher.descriptor import Descriptor
from trainer.teacher.teacher import TailDraws, Teacher, TeacherScores

LOGGER = logging.getLogger("trainer")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_GREETINGS = 3
_MOST_TOLD = 300  # characters of a server's message that are passed on


@dataclass(frozen=True)
class Manners:
    """How a server is asked.

    Attributes:
        attempts: Times that a request is sent before it is given up, whatever replica it goes to.
        connect_seconds: Until a connection stands.
        answer_seconds: Until an answer's next bytes come.
        first_pause, longest_pause: Seconds before the second attempt, doubled for each one after it up to the
            longest; a server's `Retry-After` is heeded up to the longest too.
        requests: Requests under way at each replica.
        prompts: Most prompts of a request.
        tokens: Most tokens of a request; a single longer prompt is a request of its own.
    """

    attempts: int = 6
    connect_seconds: float = 10.0
    answer_seconds: float = 300.0
    first_pause: float = 0.5
    longest_pause: float = 30.0
    requests: int = 4
    prompts: int = 8
    tokens: int = 16384


class ServerTeacher(Teacher):
    """A served model with any number of replicas.

    Proxies are those of the environment (`HTTPS_PROXY`, `NO_PROXY` and the like).

    Args:
        descriptor: What is served.
        urls: Addresses of its replicas.
        key: Sent as a bearer token; never logged, recorded or part of a message.
        manners: How it is asked.

    Raises:
        TeacherError: No replica can be reached, one serves no such model, or an address has a password in it.
    """

    kind: ClassVar[str] = "server"

    def __init__(
        self,
        descriptor: Descriptor,
        urls: Sequence[str],
        *,
        key: str | None = None,
        manners: Manners | None = None,
    ) -> None:
        for url in urls:
            if urlsplit(url).username is not None:  # libraries log addresses
                raise TeacherError(
                    f"{descriptor.url_env}: the address of {shown(url)} has a user or password in it; leave "
                    f"them out, and give the key in the environment variable {descriptor.key_env}"
                )
        self.descriptor, self.urls = descriptor, list(urls)
        self.tokenizer_sha256 = descriptor.tokenizer_sha256
        self.manners, self._key = manners or Manners(), key
        self._given_up = threading.Event()
        self._sockets: WeakSet[socket.socket] = WeakSet()  # those that stand, to be cut off
        self._style = Style.PROMPT_LOGPROBS
        # Of its own: checkpoints hold the state of the module's, which a failed attempt must not move.
        self._chance = random.Random()
        try:
            self._client = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.manners.answer_seconds, connect=self.manners.connect_seconds),
                limits=httpx.Limits(max_connections=None),
            )
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            if isinstance(error, UnicodeEncodeError):
                raise TeacherError(
                    f"the key in {descriptor.key_env} holds odd characters; correct it"
                ) from None
            raise TeacherError(
                f"no connection can be set up ({type(error).__name__}: {error}): correct or unset, in the "
                f"environment, {surroundings() or 'what concerns proxies and certificates'}"
            ) from error
        self._voices: list[ServerTeacher] = []
        self._lock = threading.Lock()
        self._load = dict.fromkeys(self.urls, 0)  # requests under way
        self._failed = dict.fromkeys(self.urls, 0)  # failures since the last success
        try:
            self._greet()
        except BaseException:
            self._client.close()
            raise

    def identity(self) -> dict[str, Any]:
        """Return model and revision; where it is served is nobody's identity."""
        return served_identity(self.descriptor)

    def voices(self) -> list[tuple[str, Teacher]]:
        """Return a teacher for each replica."""
        if len(self.urls) == 1:
            return [(shown(self.urls[0]), self)]
        if not self._voices:
            for url in self.urls:
                self._voices.append(
                    ServerTeacher(self.descriptor, [url], key=self._key, manners=self.manners)
                )
        return [(shown(voice.urls[0]), voice) for voice in self._voices]

    def give_up(self) -> None:
        """End requests under way, of any thread, and send no more: they fail, and are not tried again."""
        self._given_up.set()
        for voice in self._voices:
            voice.give_up()
        with self._lock:
            standing = list(self._sockets)
        for one in standing:
            with suppress(OSError):  # the other side has closed it, or the pool of connections
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # wakes who waits for it; closing would not

    def close(self) -> None:
        """Give up and close the connections."""
        self.give_up()
        for voice in self._voices:
            voice.close()
        self._client.close()

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> list[TeacherScores]:
        if tail is not None:
            raise TeacherError(
                f"tail_draws = {tail.count}: a server gives its likeliest tokens and not the whole "
                "distribution "
                "that tails are drawn from; set tail_draws = 0, or take a teacher with weights"
            )
        asked = [number for number, at in enumerate(wanted) if len(at)]
        # Completions of one prompt stand beside one another, where a server's prefix cache finds them.
        asked.sort(key=lambda number: tuple(sequences[number]))
        # What follows the last token that is asked about need not be read.
        prompts = {number: list(sequences[number][: wanted[number][-1] + 2]) for number in asked}
        parts = list(self._parts(asked, prompts))
        found: dict[int, TeacherScores] = {}
        failed = threading.Event()

        def answer(part: list[int]) -> None:
            scores = self._ask(
                [prompts[number] for number in part], [wanted[number] for number in part], topk, mass, failed
            )
            found.update(zip(part, scores, strict=True))

        with ThreadPoolExecutor(max_workers=self.manners.requests * len(self.urls)) as pool:
            futures = [pool.submit(answer, part) for part in parts]
            try:
                ended = wait(futures, return_when=FIRST_EXCEPTION).done
                for future in futures:
                    if future in ended:
                        future.result()
            finally:
                failed.set()  # without all of its parts the call has no answer
                pool.shutdown(wait=False, cancel_futures=True)
        nothing = TeacherScores.of_nothing(topk, 0)
        return [found.get(number, nothing) for number in range(len(sequences))]

    def _parts(self, asked: Sequence[int], prompts: dict[int, list[int]]) -> Iterator[list[int]]:
        part: list[int] = []
        size = 0
        for number in asked:
            length = len(prompts[number])
            if part and (len(part) == self.manners.prompts or size + length > self.manners.tokens):
                yield part
                part, size = [], 0
            part.append(number)
            size += length
        if part:
            yield part

    def _ask(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        failed: threading.Event,
    ) -> list[TeacherScores]:
        """Send one request until it is answered, or another one of the same call has failed for good.

        Raises:
            TeacherError: Refused, or given up.
        """
        problem = ""
        for attempt in range(self.manners.attempts):
            self._require_wanted(failed)
            url = self._take()
            pause = 0.0
            try:
                style = self._style
                body = body_of(self.descriptor.model, prompts, topk, style)
                document, problem, pause = self._post(url, body, topk)
                if not problem:
                    try:
                        scores = parse(document, prompts, wanted, topk, mass, style)
                    except UnusableAnswerError as error:
                        if error.other_style and style is Style.PROMPT_LOGPROBS:
                            self._style = Style.ECHO
                        problem = f"{shown(url)}: {error}"
                    except TeacherError as error:
                        raise TeacherError(f"{shown(url)}: {error}") from error
                    else:
                        self._release(url, failed=False)
                        return scores
            except BaseException:
                self._release(url, failed=True)
                raise
            self._release(url, failed=True)
            self._require_wanted(failed)  # before anything is told of what was cut off
            LOGGER.warning("teacher, attempt %d of %d: %s", attempt + 1, self.manners.attempts, problem)
            if attempt + 1 < self.manners.attempts:
                grown = self.manners.first_pause * 2**attempt * self._chance.uniform(0.75, 1.25)
                self._given_up.wait(min(max(pause, grown), self.manners.longest_pause))
        raise TeacherError(
            f"no answer from the teacher after {self.manners.attempts} attempts, the last: {problem}; see "
            "that "
            f"{self.descriptor.url_env} names servers that are up, and start again: finished work is kept"
        )

    def _require_wanted(self, failed: threading.Event) -> None:
        if self._given_up.is_set() or failed.is_set():
            raise TeacherError("the teacher is asked nothing more: what wanted its answer has ended")

    def _post(self, url: str, body: dict[str, Any], topk: int) -> tuple[Any, str, float]:
        """Send a request once.

        Returns:
            The answer; or what went wrong with it that another attempt may mend, and the pause asked for.

        Raises:
            TeacherError: The server refuses the request, now and for ever.
        """
        try:
            response = self._client.post(
                _endpoint(url, "completions"), json=body, extensions={"trace": self._note}
            )
        except (httpx.TransportError, httpx.DecodingError) as error:
            return None, f"{shown(url)}: {type(error).__name__}", 0.0
        if response.status_code in _AGAIN:
            return None, f"{shown(url)}: HTTP {response.status_code}", _pause(response)
        if not response.is_success:
            limit = ""
            if topk and 400 <= response.status_code < 500 and "logprobs" in response.text:
                limit = f"; start the server with --max-logprobs {topk} or more, or lower topk"
            raise TeacherError(f"{shown(url)} refuses: {_told(response)}{limit}")
        try:
            return response.json(), "", 0.0
        except ValueError:
            kind = response.headers.get("content-type", "no type")
            return None, f"{shown(url)}: the answer is no JSON ({kind}, {len(response.content)} bytes)", 0.0

    def _note(self, event: str, info: dict[str, Any]) -> None:
        """Remember the socket of a new connection, and the one that encrypts it; httpcore tells of both."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _greet(self) -> None:
        """Ask each replica which models it serves; dead ones are passed over while another lives."""
        alive, problems = [], []
        for url in self.urls:
            served, problem = self._models(url)
            if served is None:
                problems.append(f"{shown(url)}: {problem}")
                continue
            if self.descriptor.model not in served:
                raise TeacherError(
                    f"{shown(url)} serves {', '.join(sorted(served)) or 'nothing'}, not "
                    f"{self.descriptor.model}: serve that, or correct {self.descriptor.url_env}"
                )
            length = served[self.descriptor.model].get("max_model_len")
            if isinstance(length, int) and length > 1:
                # One token is generated behind every prompt, because servers insist.
                self.context = min(self.context or length - 1, length - 1)
            alive.append(url)
        if not alive:
            raise TeacherError(
                f"no teacher can be reached: {'; '.join(problems)}; start the server, or correct "
                f"{self.descriptor.url_env}"
            )
        for problem in problems:
            LOGGER.warning(
                "teacher: %s; going on with %d of %d replicas", problem, len(alive), len(self.urls)
            )
        self.urls = alive

    def _models(self, url: str) -> tuple[dict[str, dict[str, Any]] | None, str]:
        """Ask a replica for its models; one that is there and busy is asked again."""
        problem = ""
        for attempt in range(_GREETINGS):
            if attempt:
                self._given_up.wait(min(self.manners.first_pause * 2**attempt, self.manners.longest_pause))
            try:
                response = self._client.get(_endpoint(url, "models"), extensions={"trace": self._note})
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = type(error).__name__
                if isinstance(error, httpx.ConnectError):
                    break
                continue
            if response.status_code in _AGAIN:
                problem = _told(response)
                continue
            if not response.is_success:
                return None, _told(response)
            try:
                return {str(entry["id"]): entry for entry in response.json()["data"]}, ""
            except (ValueError, KeyError, TypeError):
                return None, "no list of models, so no OpenAI-compatible server"
        return None, problem

    def _take(self) -> str:
        """Choose the replica with the fewest failures of late, then the fewest requests under way."""
        with self._lock:
            url = min(self.urls, key=lambda one: (self._failed[one], self._load[one]))
            self._load[url] += 1
            return url

    def _release(self, url: str, *, failed: bool) -> None:
        with self._lock:
            self._load[url] -= 1
            self._failed[url] = self._failed[url] + 1 if failed else 0


def served_identity(descriptor: Descriptor) -> dict[str, Any]:
    """Return the identity of a served teacher."""
    return {"kind": ServerTeacher.kind, "model": descriptor.model, "revision": descriptor.revision}


def shown(url: str) -> str:
    """Return an address for messages: without user, password, path or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def _endpoint(url: str, name: str) -> str:
    return f"{url}/{name}" if url.endswith("/v1") else f"{url}/v1/{name}"


def _pause(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date: servers of models do not send those
        return 0.0


def _told(response: httpx.Response) -> str:
    text = " ".join(response.text.split())[:_MOST_TOLD]
    return f"HTTP {response.status_code}{f', {text}' if text else ''}"
