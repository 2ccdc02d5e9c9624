"""Secrets planted wherever a user has them, looked for in all that is kept; the trainer is a stand-in."""

import gzip
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.assets.graphs import Graph, copy_store, stand_in_trainer
from tests.lineage.keys import make_key
from trainer.contract.credentials import REDACTED
from trainer.contract.schema.base import ConfigError
from vpmoe_assets.browse.links import Links, page_of
from vpmoe_assets.browse.pages import Pages
from vpmoe_assets.lineage.attestation import attest, provenance_statement
from vpmoe_assets.lineage.signing import Signer

NETRC, HUB, PROXY = "netrc-0123456789abcdef", "hf_" + "QxWvUtSrQpOnMlKjIhGf", "pr0xy-passw0rd"
DATABASE, PHRASE, GIT, OPTION = "db-passw0rd-9", "a long phrase of words", "git-cr3dential", "opti0n"
WANDB, SIGNED = "wandb-key-89abcdef", "5igned5igned5igned"
PLANTED = (NETRC, HUB, PROXY, DATABASE, PHRASE, GIT, OPTION, WANDB, SIGNED)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Iterator[pytest.MonkeyPatch]:
    """A user's environment and home with a secret in each place."""
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {NETRC}\n")
    (home / ".git-credentials").write_text(f"https://me:{GIT}@host\n")
    values = {
        "HOME": str(home),
        "HF_TOKEN": HUB,
        "WANDB_API_KEY": WANDB,
        "HTTPS_PROXY": f"http://me:{PROXY}@127.0.0.1:9",
        "VPMOE_PG_PASSWORD": DATABASE,
        "VPMOE_KEY_PASSPHRASE": PHRASE,
        "VPMOE_MIRROR": f"https://me:{GIT}@host/mirror",
        "VPMOE_NOTE": f"signed in by {DATABASE}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["dagster", "materialize", "--token", OPTION, f"--u=https://a:{GIT}@h"])
        yield patch


@pytest.fixture(scope="module")
def stage(tiny_made, tmp_path_factory, planted) -> Graph:
    """The first training stage, with a store and a Dagster of its own on the disk; one for all, in order."""
    place = tmp_path_factory.mktemp("stage")
    (place / "dagster").mkdir()
    return Graph(
        tiny_made[0].experiment,
        copy_store(tiny_made[0].root, place / "artifacts"),
        dg.DagsterInstance.local_temp(str(place / "dagster")),
        {"trainer": stand_in_trainer(planted, "stand_in_telling")},
    )


def kept_by_dagster(graph: Graph) -> Path:
    return graph.root.parent / "dagster"


def leaks(*roots: Path) -> list[str]:
    """Where a planted secret stands, in files, in what they hold compressed, and in their names."""
    found = []
    for path in (path for root in roots for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        content += str(path).encode()
        found += [f"{path}: {secret}" for secret in PLANTED if secret.encode() in content]
    return found


def test_a_run_configuration_with_a_credential_is_refused_before_anything_is_made(stage):
    definitions = stage.definitions()
    config = {"resources": {"trainer": {"config": {"launcher_settings": {"account": f"https://a:{GIT}@h"}}}}}
    with stage.environment():
        result = dg.materialize(
            [asset for asset in definitions.assets or () if isinstance(asset, dg.AssetsDefinition)],
            selection=[dg.AssetKey(["tiny", "vpmoe_stage1"])],
            resources=definitions.resources,
            run_config=config,
            raise_on_error=False,
        )
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    said = failure.step_failure_data.user_failure_data.description
    assert (
        "the run configuration holds a credential at $.resources.trainer.config.launcher_settings.account"
        in said
    )
    assert f"dagster run delete {result.run_id}" in said
    assert stage.store.versions("tiny", "vpmoe_stage1") == []


def test_no_planted_secret_is_in_what_dagster_keeps_of_failures(stage, tmp_path, monkeypatch):
    address = f"https://me:{GIT}@host/x?X-Amz-Signature={SIGNED}"
    monkeypatch.setenv("STAND_IN", json.dumps({"error": f"cannot read {address}: {DATABASE}"}))
    assert not (failed := stage.run("vpmoe_stage1")).success
    assert f"cannot read https://{REDACTED}@host/x" in failed.error()

    def unreachable(*_args, **_kwargs):
        logging.getLogger("httpx").warning("HTTP Request: GET %s", address)
        try:
            raise OSError(f"Tunnel connection failed for {address}")
        except OSError as error:
            raise RuntimeError(f"cannot fetch {address} by {PROXY}") from error

    monkeypatch.setattr("vpmoe_assets.generated.generator.write_synth", unreachable)
    other = Graph(stage.experiment, tmp_path / "other", stage.instance)
    assert not (broken := other.run("synth")).success
    assert broken.error().startswith(f"OSError: Tunnel connection failed for https://{REDACTED}@host/x")
    assert f"cannot fetch https://{REDACTED}@host/x?X-Amz-Signature={REDACTED} by" in str(broken.events)
    assert leaks(kept_by_dagster(stage), other.root) == []


def test_no_planted_secret_is_in_anything_that_a_run_leaves(stage, tmp_path, caplog):
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    assert record.command == ("dagster", "materialize", "--token", REDACTED, f"--u=https://{REDACTED}@h")
    variables = record.environment["variables"]
    assert variables["VPMOE_KEY_PASSPHRASE"] == variables["VPMOE_PG_PASSWORD"] == REDACTED
    assert variables["VPMOE_NOTE"] == f"signed in by {REDACTED}"
    beside = stage.store.directory(record) / "run"
    assert REDACTED in (beside / "log.txt").read_text()
    assert [path.name for path in (beside / "wandb").iterdir()] == ["debug.log"]
    assert "tiny/vpmoe_stage1: run/wandb/run-1.wandb left out: it holds a secret" in caplog.messages
    attest(stage.store, record, Signer.of(make_key(tmp_path / "k.pem"), lambda: None))
    site = tmp_path / "site"
    site.mkdir()
    pages = Pages(stage.store)
    for number, below in enumerate(((), ("record",), ("lineage",), ("files",))):
        (site / f"{number}.html").write_text(pages.render(Links(page_of(record, *below)), {}))
    (site / "provenance.json").write_text(json.dumps(provenance_statement(record)))
    assert leaks(stage.root, kept_by_dagster(stage), site) == []


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({'name = "tiny"': f'name = "tiny"  # {HUB}'}, "line "),
        ({'name = "tiny"': f'name = "tiny"\nnote = "https://me:{GIT}@host"'}, "note: "),
    ],
)
def test_an_experiment_with_a_credential_is_refused_where_it_is_read(
    tiny_made, tmp_path, planted, changes, where
):
    text = Path(tiny_made[0].experiment).read_text()
    for old, new in changes.items():
        text = text.replace(old, new, 1)
    (tmp_path / "leaky.toml").write_text(text)
    with pytest.raises(ConfigError, match=f"leaky.toml: {where}.*found a credential") as refused:
        Graph(tmp_path / "leaky.toml", tmp_path / "artifacts").definitions()
    assert not [secret for secret in PLANTED if secret in str(refused.value)]
