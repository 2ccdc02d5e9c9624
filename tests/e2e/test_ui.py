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

from vpmoe_assets.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ASSET = "healing_text_v1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A webserver over an instance in which one asset and what it needs were materialised."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "dagster.yaml", home)
    environment = os.environ | {
        "DAGSTER_HOME": str(home),
        "VPMOE_ARTIFACTS": str(home / "artifacts"),
        "VPMOE_EXPERIMENT": "smoke",
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
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


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page was not looked at")
def test_a_browser_shows_the_page_of_an_asset(server: str, tmp_path: Path) -> None:
    page = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=30000",
            "--timeout=60000",
            "--dump-dom",
            f"{server}/assets/smoke/{ASSET}?view=overview",
        ],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    ).stdout
    for text in (
        "The healing corpus as tokens",
        "Latest check results",
        "provenance",
        "fingerprint",
        "Plots",
    ):
        assert text in page, f"{text!r} is not on the page"
