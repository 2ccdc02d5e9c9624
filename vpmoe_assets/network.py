"""Reading files over the network: time-outs, patience, going on where it broke off, one message at the end.

Nothing here waits for ever or takes what is no answer for one. What another attempt may mend (a silence, a
lost connection, 429, 5xx) is a `TransientError` and is tried again, with growing pauses and a line in the log
that says what is waited for; all else ends at once.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.surroundings import surroundings
from vpmoe_assets.errors import DataError

TIMEOUT_VARIABLE = "HF_HUB_DOWNLOAD_TIMEOUT"
_TIMEOUT_S = 10
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_log = logging.getLogger(__name__)


class NetworkError(DataError):
    """Something cannot be read over the network; the message says what, why, and what to do."""


class TransientError(NetworkError):
    """What another attempt may mend.

    Args:
        message: What happened.
        pause: Seconds that the server asks for before the next attempt.
    """

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Patience:
    """How often, and after which pauses, something is tried again.

    Attributes:
        attempts: In a row without a new byte.
        first_pause, longest_pause: Seconds before the second attempt, doubled for each one after it; what a
            server asks for is heeded up to the longest.
        sleep: Waits; tests need not.
    """

    attempts: int = 6
    first_pause: float = 1.0
    longest_pause: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, error: TransientError, remedy: str) -> None:
        """Wait before the next attempt.

        Args:
            failures: Attempts that failed in a row.
            error: Of the last.
            remedy: Said at the end.

        Raises:
            NetworkError: That was the last attempt.
        """
        if failures >= self.attempts:
            raise NetworkError(f"{error}, {failures} times in a row; {remedy}") from error
        pause = min(max(error.pause, self.first_pause * 2 ** (failures - 1)), self.longest_pause)
        _log.warning("%s; attempt %d of %d in %.0f s", error, failures + 1, self.attempts, pause)
        self.sleep(pause)

    def persist[T](self, attempt: Callable[[], T], remedy: str) -> T:
        """Return what an attempt returns, tried again while its error is transient.

        Raises:
            NetworkError: Each attempt failed.
        """
        failures = 0
        while True:
            try:
                return attempt()
            except TransientError as error:
                failures += 1
                self.wait(failures, error, remedy)


PATIENCE = Patience()
"""With what is read while a person waits: about half a minute of pauses."""


def timeout_seconds(variable: str = TIMEOUT_VARIABLE) -> int:
    """Return how long a connection may say nothing: the environment variable's seconds, 10 by default.

    Raises:
        NetworkError: It holds no number of seconds.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return _TIMEOUT_S
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise NetworkError(
            f"the environment variable {variable} is {text!r}; set it to a whole number of seconds, 1 or "
            "more, or unset it"
        )
    return int(text)


def client_of(make: Callable[[], Any]) -> Any:
    """Return what makes an HTTP client, or say which part of the environment keeps it from being made.

    Raises:
        NetworkError: A proxy of a scheme that cannot work, a file of certificates that cannot be read.
    """
    try:
        return make()
    except Exception as error:
        raise NetworkError(
            f"no connection can be set up ({_said(error)}): correct or unset, in the environment, "
            f"{surroundings() or 'what concerns proxies and certificates'}"
        ) from error


def bytes_of(
    client: Any,
    url: str,
    what: str,
    *,
    offset: int = 0,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
    refuse: Callable[[Any], object] | None = None,
) -> Iterator[bytes]:
    """Ask once for a file's bytes from an offset on.

    Args:
        client: Of httpx, or of httpx2.
        url: Of the file.
        what: Its name in messages.
        offset: Of the first byte that is wanted.
        size: Of the whole file, where it is known.
        headers: To send.
        timeout: Seconds without a byte; by default those of the environment.
        refuse: Raises for an answer that is an error, with the server's reasons.

    Yields:
        Bytes in order.

    Raises:
        TransientError: Silence, a lost connection, or a server that is busy.
        NetworkError: An answer that is an error, or that is not the file.
    """
    # Identity: a compressed answer would count its own bytes, not the file's.
    asked = {**(headers or {}), "Accept-Encoding": "identity"}
    if offset:
        asked["Range"] = f"bytes={offset}-"
    seconds = timeout_seconds() if timeout is None else timeout
    with (
        translated(what, seconds),
        client.stream("GET", url, headers=asked, follow_redirects=True, timeout=seconds) as response,
    ):
        if response.status_code == 416 and offset and size is None:
            return  # all of it is here already: nothing lies behind its end
        require_success(response, what, refuse)
        skip = offset - _require_file(response, what, offset, size)
        for chunk in response.iter_bytes():
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(0, skip - len(chunk))


def require_success(response: Any, what: str, refuse: Callable[[Any], object] | None = None) -> None:
    """Refuse an answer that is an error.

    Raises:
        TransientError: The server is busy.
        NetworkError: It will not give it.
    """
    code = response.status_code
    if code in _AGAIN:
        raise TransientError(
            f"{what}: the server is busy ({code} {response.reason_phrase})", _pause(response)
        )
    if response.is_success:
        return
    if refuse is not None:
        response.read()  # the reasons are in the body
        refuse(response)
    raise NetworkError(f"{what}: {code} {response.reason_phrase}; check the address {response.url}")


def receive(
    read: Callable[[int], Iterator[bytes]],
    partial: Path,
    what: str,
    *,
    size: int | None,
    patience: Patience,
    seen: Callable[[bytes], None] = lambda _: None,
) -> None:
    """Bring the rest of a file into its partial file, however often the connection breaks.

    Args:
        read: Asks for its bytes from an offset on.
        partial: What an earlier attempt left, or absent.
        what: Its name in messages.
        size: Of the whole, where it is known.
        patience: Attempts in a row without a new byte.
        seen: Called with all new bytes.

    Raises:
        NetworkError: It cannot be had, and what came is kept; or more came than there is of it.
    """
    done = partial.stat().st_size if partial.is_file() else 0
    failures = 0
    try:
        with partial.open("ab") as stream:
            while size is None or done < size:
                before = done
                try:
                    for chunk in read(done):
                        stream.write(chunk)
                        seen(chunk)
                        done += len(chunk)
                        if size is not None and done > size:
                            done = 0
                            raise NetworkError(
                                f"{what}: more than its {size} bytes came, of another file; they were removed"
                            )
                    if size is not None and done < size:
                        raise TransientError(f"{what}: the connection ended after {done} of {size} bytes")
                    break
                except TransientError as error:
                    stream.flush()
                    failures = 1 if done > before else failures + 1
                    patience.wait(failures, error, "start again, it will go on there")
            stream.flush()
            os.fsync(stream.fileno())
    except NetworkError:
        if not done:
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def translated(what: str, seconds: float) -> Iterator[None]:
    """Turn the errors of httpx and httpx2, known by name only, into those of this module.

    Raises:
        TransientError: Another attempt may mend it.
        NetworkError: None will.
    """
    try:
        yield
    except Exception as error:
        names = {base.__name__ for base in type(error).__mro__}
        said = _said(error)
        if "TimeoutException" in names:
            raise TransientError(f"{what}: nothing came for {seconds:g} s ({TIMEOUT_VARIABLE})") from error
        if "CERTIFICATE" in said.upper() or "ProxyError" in names:
            raise NetworkError(
                f"{what}: cannot be reached ({said}); check, in the environment, "
                f"{surroundings() or 'SSL_CERT_FILE and HTTPS_PROXY, of which none is set'}"
            ) from error
        if "LocalProtocolError" in names:  # it would repeat the header, which may be a token
            raise NetworkError(f"{what}: cannot be asked for; check HF_TOKEN for odd characters") from None
        if names & {"UnsupportedProtocol", "InvalidURL", "TooManyRedirects"}:
            raise NetworkError(f"{what}: cannot be asked for ({said}); check its address") from error
        if names & {"TransportError", "DecodingError"}:
            raise TransientError(f"{what}: cannot be reached ({said})") from error
        raise


def _require_file(response: Any, what: str, offset: int, size: int | None) -> int:
    """Return the offset at which an answer begins; refuse one that is not the file."""
    begins, whole = 0, None
    length = response.headers.get("content-length", "")
    if response.status_code == 206 and (found := _RANGE.match(response.headers.get("content-range", ""))):
        begins, whole = int(found[1]), None if found[2] == "*" else int(found[2])
    elif response.status_code == 206:
        begins = offset
    elif length.isdecimal() and response.headers.get("content-encoding", "identity") == "identity":
        whole = int(length)
    kind = response.headers.get("content-type", "")
    page = kind.startswith("text/html") and not str(response.url.path).endswith((".html", ".htm"))
    if page or begins > offset or (size is not None and whole is not None and whole != size):
        sent = f"{kind or 'no type'}, {'unknown' if whole is None else whole} bytes"
        wanted = f" of {size} bytes" if size is not None else ""
        raise NetworkError(
            f"{what}: the answer is not the file{wanted} ({sent}); see whether a proxy or a page to sign in "
            f"to answers at {response.url.host}, and start again"
        )
    return begins


def _pause(response: Any) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdecimal() else 0.0  # a date: hubs do not send those


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
