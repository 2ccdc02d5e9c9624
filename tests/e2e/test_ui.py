"""The UI as a person sees it: a real server, a real browser where the machine has one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import CHROMIUM, Browser, browser
from tests.lineage.fabricate import publish
from vpmoe_assets.browse.links import page_of
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ASSET = "healing_text_v1"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the instance, the store, and the experiment as a file that may be edited."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "dagster.yaml", home)
    shutil.copy(ROOT / "configs" / "smoke.toml", home)
    return home


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "DAGSTER_HOME": str(home),
        "VPMOE_ARTIFACTS": str(home / "artifacts"),
        "VPMOE_EXPERIMENT": str(home / "smoke.toml"),
        "VPMOE_BROWSE_PORT": str(free_port()),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def server(home: Path, environment: dict[str, str]) -> Iterator[str]:
    """A webserver over an instance in which one asset and what it needs were materialised."""
    module = ["-m", "vpmoe_assets.definitions"]
    made = subprocess.run(
        [BIN / "dagster", "asset", "materialize", *module, "--select", f'+key:"smoke/{ASSET}"'],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    port = free_port()
    log = (home / "server.log").open("w")
    process = subprocess.Popen(
        [BIN / "dagster-webserver", *module, "-h", "127.0.0.1", "-p", str(port)],
        cwd=home,
        env=environment,
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (home / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=2).read()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def ask(url: str, query: str) -> Any:
    request = urllib.request.Request(
        f"{url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        reply = json.load(answer)
    assert "errors" not in reply, reply
    return reply["data"]


def test_the_server_tells_description_checks_and_provenance_of_an_asset(server: str) -> None:
    node = ask(
        server,
        """{ assetNodes(assetKeys: [{path: ["smoke", "healing_text_v1"]}]) {
            description groupName kinds
            assetMaterializations(limit: 1) {
                metadataEntries {
                    label
                    ... on MarkdownMetadataEntry { mdStr }
                    ... on TextMetadataEntry { text }
                }
            }
            assetChecksOrError { ... on AssetChecks { checks { name blocking } } }
        } }""",
    )["assetNodes"][0]
    assert "ended by one EOD" in node["description"]
    assert (node["groupName"], node["kinds"]) == ("data", ["dataset"])
    shown = {entry["label"]: entry for entry in node["assetMaterializations"][0]["metadataEntries"]}
    ancestry = shown["provenance"]["mdStr"]
    assert [name in ancestry for name in (ASSET, "healing_corpus", "o200k_tokenizer")] == [True] * 3
    assert len(shown["digest"]["text"]) == 64
    checks = {check["name"]: check["blocking"] for check in node["assetChecksOrError"]["checks"]}
    assert checks == {"documents_aligned": True, "token_budget": True}


@pytest.fixture(scope="module")
def pages(home: Path, environment: dict[str, str], server: str) -> Iterator[str]:
    """The pages over the same store, with two stage-1 runs that differ in one value."""
    store = Store(home / "artifacts")
    donor = publish(store, "qwen3_0_6b")
    student = publish(store, "vpmoe", (donor,))
    for lr, weights, last in ((0.1, b"one", 2.5), (0.2, b"two", 2.0)):
        points = [{"step": step, "loss": 4 - step * (4 - last) / 8} for step in range(1, 9)]
        log = b"".join(json.dumps(point).encode() + b"\n" for point in points)
        publish(
            store,
            "vpmoe_stage1",
            (student,),
            recipe_keys={"optimizer": {"lr": lr}},
            files={"weights": weights},
            run={"metrics.jsonl": log},
            metrics={"loss": last},
        )
    process = subprocess.Popen(
        [BIN / "vpmoe", "browse", "--json", "--beside"],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        while not said.rstrip().endswith("}"):
            said += process.stdout.readline()
        yield json.loads(said)["url"]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as page:
        yield page


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the pages were not looked at")


@pytest.mark.browser
@needs_browser
def test_from_an_asset_in_dagsters_ui_to_its_page_its_input_and_a_run_of_it(
    server: str, pages: str, seen: Browser
) -> None:
    seen.goto(f"{server}/assets/smoke/{ASSET}?view=overview")
    seen.says("The healing corpus as tokens", "Latest check results", "provenance", "fingerprint", "Plots")
    seen.until("document.body.innerText.includes('page') && document.body.innerText.includes('digest')")
    text = seen.text()
    assert (
        text.index("\npage")
        < text.index("\ntokens")
        < text.index("\nprovenance")
        < text.index("\nfingerprint")
    )
    link = seen.until(f"document.querySelector('a[href^={json.dumps(pages)}]')?.href")
    seen.click("button", "Materialize")
    query = "{ runsOrError { ... on Runs { results { status assetSelection { path } } } } }"
    for _ in range(100):
        runs = ask(server, query)["runsOrError"]["results"]
        if len(runs) == 2:
            break
        time.sleep(0.2)
    assert runs[0]["assetSelection"] == [{"path": ["smoke", ASSET]}]
    seen.goto(link)
    seen.says(ASSET, "fresh", "documents_aligned", "111,153")
    seen.follow("a", "healing_corpus")
    seen.says("Nothing in the store: it is a source", "Used by")


@pytest.mark.browser
@needs_browser
def test_two_stage_1_runs_are_compared_and_the_donor_is_walked_to(pages: str, seen: Browser) -> None:
    seen.goto(f"{pages}smoke/vpmoe_stage1/")
    seen.follow("a", "what changed")
    seen.says("optimizer.lr", "0.1", "0.2", "-20.00 %")
    assert seen.js("document.querySelectorAll('polyline').length") == 2
    seen.goto(f"{pages}smoke/vpmoe_stage1/")
    seen.follow("tbody th a")
    assert seen.js("document.querySelector('polyline').getBoundingClientRect().width") > 100
    seen.follow("nav a", "Lineage")
    seen.follow("svg a", "qwen3_0_6b")
    seen.says("qwen3_0_6b", "used by 3")


@pytest.mark.browser
@needs_browser
def test_a_changed_config_is_told_alike_by_dagster_why_and_the_page(
    server: str, pages: str, home: Path, environment: dict[str, str], seen: Browser
) -> None:
    toml = home / "smoke.toml"
    toml.write_text(toml.read_text().replace("max_tokens = 200000", "max_tokens = 6000"))
    mutation = "mutation { reloadWorkspace { __typename } }"
    assert ask(server, mutation)["reloadWorkspace"]["__typename"] == "Workspace"
    seen.goto(f"{server}/assets/smoke/{ASSET}?view=overview")
    seen.says("Unsynced")
    told = subprocess.run(
        [BIN / "vpmoe", "why", ASSET], cwd=home, env=environment, capture_output=True, text=True, check=True
    ).stdout
    reason = "max_tokens 200000 → 6000"
    assert reason in told
    latest = Store(home / "artifacts").latest("smoke", ASSET)
    assert latest is not None
    seen.goto(f"{pages}{page_of(latest)}")
    seen.says("stale", reason)
    seen.goto(f"{pages}smoke/")
    seen.says(reason)
