"""What `vpmoe show --sources` lists: the code of an artifact as recorded, or of an asset as it is now."""

from typing import Any

import click

from vpmoe_assets.commands.common import asset_named, open_store, print_json
from vpmoe_assets.commands.present import load_steps, step_of

_NOW = {"same": "", "changed": "says another thing now", "gone": "is no longer there"}


def show_sources(asset: str, experiment: str | None, *, as_json: bool) -> None:
    """List the code of an asset: as recorded where a version is in the store, else as it would be now."""
    from vpmoe_assets.codebase.bystanders import BYSTANDERS

    named, name, version = asset_named(asset, experiment)
    record = None if version == "now" else open_store().find(named, name, version)
    if record is not None:
        payload = record.fingerprint_payload
        answer: dict[str, Any] = {
            "asset": f"{record.experiment}/{record.asset}",
            "of": record.version,
            "schema": payload.get("schema"),
            "sources": dict(payload.get("sources", {})),
            "packages": dict(payload.get("packages", {})),
        }
        answer["now"] = _compared(answer["schema"], answer["sources"])
    elif version not in (None, "now"):
        from vpmoe_assets.lineage.errors import ArtifactMissing

        raise ArtifactMissing(f"{named}/{name}@{version} is not in the store; @now lists the present code")
    else:
        named, steps = load_steps(experiment or named)
        code = step_of(steps, named, name).closure
        answer = {
            "asset": f"{named}/{name}",
            "of": "now",
            "schema": None,
            "roots": list(code.roots),
            "sources": dict(code.sources),
            "packages": dict(code.packages),
        }
    answer["bystanders"] = dict(BYSTANDERS)
    if as_json:
        print_json(answer)
    else:
        _print(answer)


def _compared(schema: str | None, sources: dict[str, str]) -> dict[str, str]:
    """Say of each recorded file whether the present one says the same; nothing where bytes were kept."""
    from vpmoe_assets.codebase.tree import current
    from vpmoe_assets.lineage.fingerprint import SCHEMA

    if schema != SCHEMA:
        return {}
    tree = current()
    return {
        path: "gone"
        if path not in tree.content
        else "same"
        if tree.facts(path).digest == digest
        else "changed"
        for path, digest in sources.items()
    }


def _print(answer: dict[str, Any]) -> None:
    recorded = "as the code is now" if answer["of"] == "now" else f"as recorded in {answer['of']}"
    click.echo(f"{answer['asset']}: {len(answer['sources'])} files decide its bytes, {recorded}")
    for path, digest in answer["sources"].items():
        said = _NOW[answer.get("now", {}).get(path, "same")]
        click.echo(f"  {digest[:12]}  {path}" + (f"  ({said})" if said else ""))
    click.echo("\npackages")
    for name, release in answer["packages"].items() or [("none", "")]:
        click.echo(f"  {name} {release}".rstrip())
    click.echo("\nbystanders: loaded beside it, part of no fingerprint")
    for name, reason in answer["bystanders"].items():
        click.echo(f"  {name}: {reason}")
