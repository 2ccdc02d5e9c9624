"""What a page over 10,000 records and 1,000,000 files costs: first, again, and after a version was published.

    python -m benchmarks.pages [--store DIRECTORY] [--records 10000] [--files 1000000] [--record]

The store is a synthetic one (`benchmarks.synthetic_store`) unless one is named, which gets one version more.
*First* is the first page that a process makes of a store whose heads are remembered in `.work`, its templates
compiled; *after* is the first one after a version of stage 1 was published; the best of some tries each.
Comparator: the limit that a page is held to.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import record as append
from benchmarks.synthetic_store import command_line, write_store
from trainer.contract.canonical import sha256_json
from vpmoe_assets.browse.catalog import View
from vpmoe_assets.browse.links import Links, page_of
from vpmoe_assets.browse.pages import Pages
from vpmoe_assets.lineage.record import Draft
from vpmoe_assets.lineage.store import Store

LIMIT_S = 0.3
REPEATS = 5
EXPERIMENT, ASSET = "exp_00", "vpmoe_stage1"


def main() -> None:
    """Measure, print, and with `--record` remember."""
    given = command_line(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.store or Path(scratch) / "artifacts"
        if given.store is None:
            write_store(root, given.records, given.files)
        count = sum(1 for _ in Store(root).heads())  # and remembers them
        result = _measured(root, count)
        for name, took in result["details"]["ms"].items():
            told = "   ".join(f"{when} {ms:>5} ms" for when, ms in took.items())
            print(f"{name:<11} {told}")
        print(f"slowest {result['value']:.0f} ms, {result['ratio']:.3g} x {result['comparator']}")
        if given.record:
            append(**result)


def _measured(root: Path, records: int) -> dict[str, Any]:
    addresses = _addresses(Pages(Store(root)).catalog.view(EXPERIMENT))
    first = {name: min(_first(root, at) for _ in range(REPEATS)) for name, at in addresses.items()}
    pages = Pages(Store(root))
    for address in addresses.values():
        pages.render(Links(address))
    again = {name: min(_ms(pages, at) for _ in range(REPEATS)) for name, at in addresses.items()}
    after = {}
    for name, address in addresses.items():
        after[name] = min(_after(pages, address) for _ in range(REPEATS))
    slowest = max(*first.values(), *again.values(), *after.values())
    return {
        "name": "pages",
        "value": slowest,
        "unit": "ms",
        "comparator": f"the limit of {LIMIT_S * 1000:.0f} ms for the slowest of them",
        "ratio": LIMIT_S * 1000 / slowest,
        "details": {
            "records": records,
            "ms": {
                name: {"first": round(first[name]), "again": round(again[name]), "after": round(after[name])}
                for name in addresses
            },
        },
    }


def _addresses(view: View) -> dict[str, str]:
    """Return a page of every kind."""
    *_, old, new = view.assets[ASSET].heads
    chain = view.assets["chain"].heads
    return {
        "store": "",
        "experiment": f"{EXPERIMENT}/",
        "history": f"{EXPERIMENT}/{ASSET}/",
        "artifact": page_of(new),
        "lineage": page_of(new, "lineage"),
        "chain": page_of(chain[len(chain) // 2], "lineage"),
        "files": page_of(new, "files"),
        "record": page_of(new, "record"),
        "compared": page_of(new, "diff", EXPERIMENT, ASSET, old.version),
    }


def _first(root: Path, address: str) -> float:
    """Return the milliseconds of the first page over a store."""
    pages = Pages(Store(root))
    pages.missing(Links(""), "")  # compiles what all pages share
    return _ms(pages, address)


def _ms(pages: Pages, address: str) -> float:
    began = time.perf_counter()
    pages.render(Links(address))
    return (time.perf_counter() - began) * 1000


def _after(pages: Pages, address: str) -> float:
    """Return the milliseconds of a page after one more version was published."""
    _publish(pages.store)
    return _ms(pages, address)


def _publish(store: Store) -> None:
    """Publish one more version of stage 1, made like the last one with another seed."""
    head = store.latest(EXPERIMENT, ASSET)
    assert head is not None
    last = store.record(head)
    payload = {**last.fingerprint_payload, "recipe": {**last.recipe, "again": last.sequence}}
    with store.work_area(EXPERIMENT, ASSET, sha256_json(payload)) as work:
        (work.payload / "part.bin").write_bytes(str(last.sequence).encode())
        fields = {name: getattr(last, name) for name in Draft.model_fields if hasattr(last, name)}
        store.publish(work, Draft.model_validate(fields | {"fingerprint_payload": payload}))


if __name__ == "__main__":
    main()
