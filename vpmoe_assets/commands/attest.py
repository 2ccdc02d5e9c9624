"""`vpmoe attest`: sign an artifact, and all that it was made from, so that a stranger can check it."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import (
    asset_named,
    experiment_option,
    find_record,
    json_option,
    open_index,
    open_store,
    print_json,
    refuse_store,
)

if TYPE_CHECKING:
    from vpmoe_assets.lineage.record import Record
    from vpmoe_assets.lineage.statements import Statement
    from vpmoe_assets.lineage.store import Store

PASSPHRASE = "VPMOE_KEY_PASSPHRASE"


@click.command()
@click.argument("asset", metavar="ASSET[@VERSION]")
@experiment_option
@click.option(
    "--key",
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="PRIVATE.PEM",
    help="An EC key over P-256, P-384 or P-521 that nobody else can read.",
)
@click.option("--ancestors", is_flag=True, help="Sign everything that it was made from, too.")
@click.option(
    "--output",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Write signature, provenance and public key there as well, to be handed on with the payload.",
)
@json_option
def attest(
    asset: str, experiment: str | None, key: str, ancestors: bool, output: str | None, as_json: bool
) -> None:
    """Sign the bytes of an artifact and how they came about, with a key of yours.

    Two in-toto statements are signed: that of model-signing over every file of the payload, which binds the
    record, and SLSA provenance from the record: recipe, inputs, code, packages, machine. They are kept as a
    statement beside the record; the payload stays as it is. The command that is printed checks it without
    this program (`pip install model-signing pyopenssl`). What this key has signed already stays signed. The
    passphrase of an encrypted key is asked for, or taken from VPMOE_KEY_PASSPHRASE.

    \b
    Examples:
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes-256-cbc -out private.pem
      vpmoe attest vpmoe_stage1 --key private.pem
      vpmoe attest vpmoe_stage1 --key private.pem --ancestors --output signed/
      vpmoe verify vpmoe_stage1 --key public.pem
      vpmoe attest vpmoe_stage1 --key private.pem --json | jq -r '.signed[].command'
    """  # noqa: D301
    from vpmoe_assets.lineage.attestation import attest as signed_now
    from vpmoe_assets.lineage.attestation import strangers_command
    from vpmoe_assets.lineage.layout import version_name
    from vpmoe_assets.lineage.signing import Signer

    store = open_store()
    record = find_record(store, *asset_named(asset, experiment))
    if project.store_root() in Path(os.path.realpath(key)).parents:
        raise click.ClickException(f"--key {key} lies in the store, with what it signs; keep it elsewhere")
    if output is not None:
        refuse_store(Path(output))
    signer = Signer.of(Path(key), _passphrase)
    records = [*(_ancestors(store, record) if ancestors else ()), record]
    answer: list[dict[str, Any]] = []
    for each in records:
        said, new = signed_now(store, each, signer)
        command = shlex.join(strangers_command(store, each, said))
        answer.append(
            {"artifact": version_name(each), "new": new, "statement": said.id, "command": command}
            | {name: said.body[name] for name in ("payload", "provenance", "public_key")}
        )
        if not as_json:
            how = "signed" if new else "signed already"
            click.echo(f"{version_name(each)} {how} with key {signer.key[:12]}")
        if output is not None:
            _write(store, said, Path(output, each.asset, each.version) if ancestors else Path(output))
    if any(each["new"] for each in answer):
        open_index().update(store)
    if as_json:
        print_json({"key": signer.key, "signed": answer})
        return
    click.echo(f"anybody checks it with\n  {answer[-1]['command']}")
    if output is not None:
        click.echo(f"model.sig, provenance.sig and public.pem are in {output}")


def _passphrase() -> str | None:
    if given := os.environ.get(PASSPHRASE):
        return given
    if not sys.stdin.isatty():
        return None
    asked: str = click.prompt("Passphrase of the key", hide_input=True, err=True)
    return asked


def _ancestors(store: "Store", record: "Record") -> "list[Record]":
    """Return what an artifact was made from, inputs first.

    Raises:
        ClickException: One of them is gone: its bytes cannot be signed.
    """
    from vpmoe_assets.lineage.layout import version_name

    found: dict[str, Record] = {}
    queue = [record]
    for current in queue:  # it grows
        for reference in current.inputs:
            head = store.head(current.experiment, reference)
            if head is None:
                raise click.ClickException(
                    f"{version_name(current)} was made from {reference.asset}@{reference.version}, which is "
                    "not in the store and cannot be signed; materialise it again, or leave out --ancestors"
                )
            if head.record_digest not in found:
                found[head.record_digest] = store.record(head)
                queue.append(found[head.record_digest])
    return sorted(found.values(), key=lambda each: (each.published_utc, each.asset))


def _write(store: "Store", said: "Statement", directory: Path) -> None:
    from vpmoe_assets.lineage.objects import ObjectStore

    directory.mkdir(parents=True, exist_ok=True)
    names = {"payload": "model.sig", "provenance": "provenance.sig", "public_key": "public.pem"}
    for role, name in names.items():
        (directory / name).write_bytes(ObjectStore(store.root).get(said.body[role]))
