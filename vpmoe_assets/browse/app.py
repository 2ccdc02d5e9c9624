"""The pages on a server: GET alone, for the hosts it is known by, nothing from elsewhere.

The server listens on this machine unless it is told otherwise. A page of another site cannot read it: a name
that was made to point here (DNS rebinding) is refused by the Host header, and every answer forbids scripts,
frames and sources from elsewhere.
"""

import ipaddress
import threading
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vpmoe_assets.browse.links import Links
from vpmoe_assets.browse.pages import STYLE, PageMissing, Pages
from vpmoe_assets.lineage.designation import Group, designated
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import experiment_name

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_TEXT = (".txt", ".log", ".json", ".jsonl", ".md", ".toml", ".yaml", ".csv", ".html")
"""Files that a browser shows, as plain text, whatever is in them; others are downloaded, but for images."""
_TEXT_NAMES = ("STATUS",)


def is_loopback(host: str) -> bool:
    """Whether an address or name is of this machine alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def application(pages: Pages, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """Return the application.

    Args:
        pages: What it serves.
        hosts: Names and addresses by which it may be asked.
    """
    # Pages are made one at a time: they share what they remember, and cost milliseconds.
    lock = threading.Lock()

    def style(request: Request) -> Response:
        return FileResponse(STYLE, media_type="text/css")

    def compare(request: Request) -> Response:
        try:
            with lock:
                old, new = (_named(pages.store, request.query_params.get(side, "")) for side in "ab")
        except (ValueError, LineageError, OSError) as error:
            return _missing(pages, "", str(error))
        return RedirectResponse("/" + quote("/".join((*new, "diff", *old))) + "/", HTTPStatus.SEE_OTHER)

    def page(request: Request) -> Response:
        address = request.path_params["address"]
        if address and not address.endswith("/") and "/raw/" not in address:
            return RedirectResponse(f"/{quote(address)}/", HTTPStatus.PERMANENT_REDIRECT)
        try:
            with lock:
                if "/raw/" in address:
                    return _raw(pages, address)
                return _html(pages.render(Links(address), request.query_params))
        except (PageMissing, LineageError) as error:
            return _missing(pages, address, str(error))

    return Starlette(
        routes=[
            Route("/style.css", style, methods=["GET"]),
            Route("/compare", compare, methods=["GET"]),
            Route("/{address:path}", page, methods=["GET"]),
        ],
        middleware=[Middleware(Guard, hosts=tuple(hosts))],
    )


class Guard:
    """Refuse what is asked of another host, and say in every answer what a browser may do with it."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(key, value) for key, value in message["headers"] if key.decode() not in _HEADERS]
                message["headers"] = [*headers, *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        asked = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(asked) != 1 or _host(asked[0]) not in self._hosts:
            refusal = PlainTextResponse(
                f"refused: these pages are at {', '.join(sorted(self._hosts))}, and were asked for as "
                f"{asked[0] if asked else 'nobody'}\n",
                HTTPStatus.MISDIRECTED_REQUEST,
            )
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def _host(header: str) -> str:
    """Return the host of a Host header, in lower case, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()


def _named(store: Store, text: str) -> tuple[str, str, str]:
    """Return experiment, asset and version of what a word names, as `vpmoe diff` takes it.

    Raises:
        ValueError: It names several artifacts, or none could be meant.
        LineageError: There is no such artifact; says what there is.
    """
    found = designated(store, text.strip(), Path(experiment_name()).name.removesuffix(".toml"))
    if isinstance(found, Group):
        raise ValueError(f"{text!r} is a whole {found.what}: name one artifact, or use `vpmoe diff`")
    return found.experiment, found.asset, found.version


def _html(text: str, status: int = HTTPStatus.OK) -> Response:
    return Response(text, status, media_type="text/html; charset=utf-8")


def _missing(pages: Pages, address: str, said: str) -> Response:
    return _html(pages.missing(Links(address), said), HTTPStatus.NOT_FOUND)


def _raw(pages: Pages, address: str) -> Response:
    found = pages.raw(address)
    if found.content is not None:
        return Response(found.content, media_type="application/json")
    assert found.path is not None
    if found.name.lower().endswith(_TEXT) or found.name in _TEXT_NAMES:
        return FileResponse(found.path, media_type="text/plain; charset=utf-8")
    if found.name.lower().endswith(".png"):
        return FileResponse(found.path, media_type="image/png")
    return FileResponse(found.path, media_type="application/octet-stream", filename=found.name)
