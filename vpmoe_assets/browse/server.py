"""The server of the pages: listening before anything is said, ended by Ctrl-C or when nobody reads on."""

import errno
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from vpmoe_assets.browse.app import LOOPBACK, application, is_loopback
from vpmoe_assets.browse.comparison import Comparison
from vpmoe_assets.browse.pages import Pages
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import experiment_name


class ServerError(Exception):
    """The server cannot run like that; the message says what to do."""


class Server:
    """One server over one store.

    Args:
        store: Whose pages it serves.
        host: Address or name to listen on.
        port: To listen on; 0 takes one that is free.
        expose: Whether an address that others can reach is meant.
        until_idle: Seconds without a request after which it ends; None for never.
        beside: Whether it ends with the process that started it.

    Raises:
        ServerError: The address is open to others, and nobody said that this is meant.
    """

    def __init__(
        self,
        store: Store,
        host: str,
        port: int,
        *,
        expose: bool = False,
        until_idle: float | None = None,
        beside: bool = False,
    ) -> None:
        if not is_loopback(host) and not expose:
            raise ServerError(
                f"--host {host} can be reached by other machines, and whoever reaches the port reads the "
                "whole store: add --expose if that is meant, or leave --host out"
            )
        self.store, self.host, self.port = store, host, port
        self._until_idle = math.inf if until_idle is None else until_idle
        self._parent = os.getppid() if beside else None
        self._asked = time.monotonic()

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        named = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{named}:{self.port}/"

    @contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """Listen while the block lasts.

        Raises:
            ServerError: Nobody can listen there.
        """
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((self.host, self.port), family=family)
        except (OSError, UnicodeError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            what = (
                "is taken"
                if taken
                else f"cannot be had on {self.host} ({getattr(error, 'strerror', None) or error})"
            )
            raise ServerError(f"port {self.port} {what}: choose another with --port") from error
        with listener:
            self.port = listener.getsockname()[1]
            yield listener

    def run(self, listener: socket.socket) -> None:
        """Serve until Ctrl-C, or until nobody reads on."""
        comparison = Comparison(self.store)
        pages = Pages(self.store, comparison)
        config = uvicorn.Config(
            self._noted(application(pages, self._hosts())),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
        )
        server = uvicorn.Server(config)
        threading.Thread(target=self._warm, args=(pages,), name="first look", daemon=True).start()
        threading.Thread(target=self._wait, args=(server,), name="end", daemon=True).start()
        try:
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
        finally:
            comparison.close()

    def _warm(self, pages: Pages) -> None:
        name = experiment_name()
        with suppress(LineageError, OSError):
            pages.warm(Path(name).stem if name.endswith(".toml") else name)

    def _noted(self, app: ASGIApp) -> ASGIApp:
        async def noted(scope: Scope, receive: Receive, send: Send) -> None:
            self._asked = time.monotonic()
            await app(scope, receive, send)
            self._asked = time.monotonic()

        return noted

    def _wait(self, server: uvicorn.Server) -> None:
        while (left := self._asked + self._until_idle - time.monotonic()) > 0:
            if self._parent not in (None, os.getppid()):
                break
            time.sleep(min(left, 1.0))
        server.should_exit = True

    def _hosts(self) -> list[str]:
        """Return the names by which it may be asked for."""
        if is_loopback(self.host):
            return [*LOOPBACK, self.host]
        names = {*LOOPBACK, self.host, socket.gethostname(), socket.getfqdn(), os.uname().nodename}
        with suppress(OSError):
            names |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
        return sorted(names)
