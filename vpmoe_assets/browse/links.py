"""Addresses of pages: the same tree on the server and in a directory of files.

::

    <experiment>/                                   overview
    <experiment>/<asset>/                           history
    <experiment>/<asset>/at-work/                   jobs that have not been published, while they run
    <experiment>/<asset>/<version>/                 one artifact; below it lineage/, files/, record/
    <experiment>/<asset>/<version>/diff/<experiment>/<asset>/<version>/     two of them
    <experiment>/<asset>/<version>/raw/…            files, as they lie in the store

Links are relative, so that pages work wherever they lie.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import quote

from vpmoe_assets.lineage.layout import Versioned, version_name

PORT_VARIABLE = "VPMOE_BROWSE_PORT"
USUAL_PORT = 3100
"""Where the pages are unless the variable says otherwise: links from Dagster are made by other processes,
which have to know it without asking."""


AT_WORK = "at-work"
"""In the place of a version, which begins with a date."""


def at_work(experiment: str, asset: str) -> str:
    """Return the address of the page of an asset's jobs at work."""
    return f"{experiment}/{asset}/{AT_WORK}/"


def page_of(named: Versioned, *below: str) -> str:
    """Return the address of an artifact's page, or of one below it."""
    return "/".join((version_name(named), *below)) + "/"


def port() -> int:
    """Return the port of the pages: `$VPMOE_BROWSE_PORT`, or the usual one.

    Raises:
        ValueError: The variable holds no port.
    """
    given = os.environ.get(PORT_VARIABLE, "")
    if not given:
        return USUAL_PORT
    if given.isascii() and given.isdecimal() and len(given) < 6 and 0 < int(given) < 65536:
        return int(given)
    raise ValueError(f"{PORT_VARIABLE}={given!r} is no port: give a number from 1 to 65535")


def page_url(named: Versioned) -> str:
    """Return the URL under which a browser on this machine finds an artifact's page."""
    try:
        where = port()
    except ValueError:  # a link is no reason to end a step; `vpmoe browse` refuses the value
        where = USUAL_PORT
    return f"http://127.0.0.1:{where}/{page_of(named)}"


@dataclass(frozen=True)
class Links:
    """Links from one page.

    Attributes:
        page: Its address, empty for the first page.
        files: Whether pages are files, of which a browser opens no directory.
        there: Addresses of all pages that there are; None where every page is made when it is asked for.
        raw: Addresses of all raw files that there are; None likewise.
    """

    page: str
    files: bool = False
    there: Collection[str] | None = field(default=None, repr=False)
    raw: Collection[str] | None = field(default=None, repr=False)

    def to(self, address: str) -> str | None:
        """Return the relative link to a page (its address ends with `/`, or is empty) or to a file.

        Returns:
            None where that is not among the files: then there is nothing to link to.
        """
        is_page = not address or address.endswith("/")
        known = self.there if is_page else self.raw
        if known is not None and address not in known:
            return None
        target = quote(address) + ("index.html" if self.files and is_page else "")
        return ("../" * self.page.count("/") + target) or "./"

    def style(self) -> str:
        """Return the link to the style sheet."""
        return "../" * self.page.count("/") + "style.css"
