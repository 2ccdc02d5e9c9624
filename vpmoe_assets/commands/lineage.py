"""`vpmoe lineage`: the materialisations that an artifact came from, and those that came from it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_store,
    print_json,
    refuse_store,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.graph import Graph, Line
    from vpmoe_assets.lineage.heads import Head
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.remarks import Remark, Remarks
    from vpmoe_assets.lineage.store import Store

FORMATS = ("tree", "mermaid", "json", "openlineage", "svg")


@click.command()
@click.argument("asset")
@experiment_option
@click.option("--up", "direction", flag_value="up", help="Only what it came from.")
@click.option("--down", "direction", flag_value="down", help="Only what was made from it.")
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Only so many steps from it.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="tree", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write instead of printing.")
@json_option
def lineage(
    asset: str,
    experiment: str | None,
    direction: str | None,
    depth: int | None,
    form: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Show the materialisations behind an artifact and after it: what was really used, not today's code.

    A version that is gone is told from the ledger, and the way goes on behind it. A line that starts with `!`
    says by whose word something counted. `openlineage` is one JSON event a line, for a catalogue such as
    Marquez; `svg` is a picture for any browser.

    \b
    Examples:
      vpmoe lineage vpmoe_stage1
      vpmoe lineage qwen3_0_6b --down                       # everything made from the donor
      vpmoe lineage vpmoe_stage1@20260131.2-0a1b2c3d --up --json
      vpmoe lineage vpmoe_stage1 --format svg -o lineage.svg
    """  # noqa: D301
    from vpmoe_assets.lineage import graph as graphs
    from vpmoe_assets.lineage.remarks import Remarks

    if output is not None:
        refuse_store(output)
        if output.is_dir():
            raise click.ClickException(f"--output {output} is a directory; name a file")
    store = open_store()
    record = _named(store, *asset_named(asset, experiment))
    walks = {"up": graphs.ancestors, "down": graphs.descendants, None: graphs.both_ways}
    graph = walks[direction](store, record)
    if depth is not None:
        graph = graph.within(depth)
    text = _written("json" if as_json else form, graph, direction, Remarks(store))
    if output is None:
        click.echo(text, nl=False)
        return
    output.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"artifacts": len(graph.nodes), "output": str(output)})
    else:
        click.echo(f"{len(graph.nodes)} artifacts in {output}")


def _named(store: "Store", experiment: str, asset: str, version: str | None) -> "Record | Head":
    """Return an artifact that is in the store, or a version that is gone and that the ledger remembers."""
    from vpmoe_assets.lineage.errors import ArtifactMissing
    from vpmoe_assets.lineage.graph import all_records

    try:
        return find_record(store, experiment, asset, version)
    except ArtifactMissing:
        for node in all_records(store).nodes.values() if version else ():
            if (node.experiment, node.asset, node.version) == (experiment, asset, version) and node.head:
                return node.head
        raise


def _written(form: str, graph: "Graph", direction: str | None, remarks: "Remarks") -> str:
    if form == "mermaid":
        from vpmoe_assets.lineage.export.mermaid import flowchart

        return flowchart(graph)
    if form == "openlineage":
        from trainer.contract.canonical import canonical_json
        from vpmoe_assets.lineage.export.openlineage import events

        return "".join(canonical_json(event) + "\n" for event in events(graph))
    if form == "svg":
        from vpmoe_assets.lineage.export.svg import draw

        own = {digest: [each.line() for each in _own(graph, digest, remarks)] for digest in graph.nodes}
        return draw(graph, remarks={digest: "\n".join(lines) for digest, lines in own.items() if lines})
    if form == "json":
        from trainer.contract.printed import exact_json

        return exact_json(_as_dict(graph, remarks), indent=1) + "\n"
    return "".join(f"{line}\n" for line in _trees(graph, direction, remarks))


def _as_dict(graph: "Graph", remarks: "Remarks") -> dict[str, Any]:
    told = graph.to_dict()
    for node in told["nodes"]:
        node["remarks"] = [each.to_dict() for each in _own(graph, node["record_digest"], remarks)]
    return told


def _own(graph: "Graph", digest: str, remarks: "Remarks") -> "Sequence[Remark]":
    head = graph.nodes[digest].head
    return [] if head is None else remarks.own(head)


def _adopted(graph: "Graph", digest: str, remarks: "Remarks") -> "list[Remark]":
    from vpmoe_assets.lineage.remarks import Adopted

    return [each for each in _own(graph, digest, remarks) if isinstance(each, Adopted)]


def _trees(graph: "Graph", direction: str | None, remarks: "Remarks") -> Iterator[str]:
    if direction != "down":
        yield from _tree(graph, remarks, down=False)
    if direction is None:
        yield ""
        yield "made from it" if graph.children.get(graph.start) else "nothing was made from it"
    if direction != "up":
        lines = _tree(graph, remarks, down=True)
        if direction is None:
            next(lines)  # itself, which stands above
        yield from lines


def _tree(graph: "Graph", remarks: "Remarks", *, down: bool) -> Iterator[str]:
    lines = list(graph.tree(down=down))
    for line, (stem, indent) in zip(lines, branches([line.depth for line in lines]), strict=True):
        yield stem + _line(line)
        if line.depth == 0:
            beside = _own(graph, graph.start, remarks)
        else:
            remark = remarks.on(line.node.experiment, line.reference)
            beside = [] if remark is None else [remark]
            beside += _adopted(graph, line.node.record_digest, remarks)
        for each in beside:
            yield f"{indent}! {each.line()}"


def branches(depths: Sequence[int]) -> list[tuple[str, str]]:
    """Return what stands before each line of a tree, and before what is said beside it.

    Args:
        depths: Of the lines, from the root's 0 on.
    """
    open_below: set[int] = set()
    drawn: list[tuple[str, str]] = []
    for depth in reversed(depths):
        trunk = "".join("│  " if level in open_below else "   " for level in range(1, depth))
        last = depth not in open_below
        drawn.append((trunk + ("└─ " if last else "├─ "), trunk + ("   " if last else "│  ")))
        open_below = {level for level in open_below if level < depth} | {depth}
    return [each if depth else ("", "") for each, depth in zip(reversed(drawn), depths, strict=True)]


def _line(line: "Line") -> str:
    from vpmoe_assets.lineage.export.labels import numbers

    node, role = line.node, line.reference.role
    as_what = f" as {role}" if role not in ("self", line.reference.asset) else ""
    note = {"present": "", "gone": "  NOT IN THE STORE", "unknown": "  UNKNOWN TO THE STORE"}[node.state]
    if line.repeated:
        note += "  (see above)"
    elif node.headline:
        note += f"  {numbers(list(node.headline.items())[:2])}"
    if node.head is not None and (origin := node.head.original) is not None:
        note += f"  (the files of {origin.experiment}/{origin.asset}@{origin.version})"
    when = "" if node.head is None else f"  {node.head.published_utc[:16].replace('T', ' ')}"
    return f"{node.asset}@{node.version}  {node.digest[:8]}{as_what}{when}{note}"
