"""The story of a user: `make ui`, a real browser where the machine has one, a small real training.

The tests of this module go on where the one before has stopped, in one home with one server.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.assets.graphs import SHALLOW, write_experiment
from tests.e2e.browser import CHROMIUM, Browser, browser
from tests.lineage.fabricate import publish
from vpmoe_assets.browse.links import page_of
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the pages were not looked at")

BIN = Path(sys.executable).parent
STAGE, DATA = "vpmoe_stage1", "synth_kd_v1"
RARELY = {"save_interval = 5": "save_interval = 50", "eval_interval = 5": "eval_interval = 50"}
LR = ("\nlr = 2e-3\n", "\nlr = 1e-3\n")
BEHIND = {DATA, "synth_harmony", "synth", "o200k_tokenizer"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually[T](found: Callable[[], T], seconds: float = 300) -> T:
    """Wait until something is found, and return it."""
    end = time.monotonic() + seconds
    while not (it := found()):
        assert time.monotonic() < end, f"nothing came of it in {seconds} s"
        time.sleep(0.2)
    return it


@dataclass(frozen=True)
class Ui:
    """What `make ui` started.

    Attributes:
        home: A directory with an instance, a store, and the experiment as a file that may be edited.
        environment: Of every command there.
        url: Of Dagster's UI.
        pages: Of the pages.
        process: Make's.
    """

    home: Path
    environment: dict[str, str]
    url: str
    pages: str
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        return (self.home / "ui.log").read_text()

    @cached_property
    def store(self) -> Store:
        return Store(self.home / "artifacts")

    def versions(self, asset: str) -> list[Head]:
        """All published versions, oldest first."""
        with suppress(FileNotFoundError):
            return self.store.scan("tiny", asset)[0]
        return []

    def ask(self, query: str) -> Any:
        """Ask Dagster."""
        request = urllib.request.Request(
            f"{self.url}/graphql", json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            reply = json.load(answer)
        assert "errors" not in reply, reply
        return reply["data"]

    def run(self, *command: str, code: int = 0) -> str:
        """Run an installed program in the home, which ends with this code; return what it printed."""
        done = subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """`make ui` in a home of its own, with a small experiment; the environment counts as made."""
    home = tmp_path_factory.mktemp("home")
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, home)
    write_experiment(home / "tiny.toml", {**SHALLOW, **RARELY})
    left_out = ("VPMOE_", "DAGSTER_", "PYTHONPATH")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(left_out)} | {
        "DAGSTER_HOME": str(home),
        "VPMOE_ARTIFACTS": str(home / "artifacts"),
        "VPMOE_EXPERIMENT": str(home / "tiny.toml"),
        "VPMOE_BROWSE_PORT": str(free_port()),
        "VPMOE_WORKERS": "1",
        "WANDB_MODE": "disabled",
    }
    port = free_port()
    arguments = ["-f", ROOT / "Makefile", "-o", "dagster.yaml", "STAMP=dagster.yaml", f"BIN={BIN}"]
    with (home / "ui.log").open("w") as log:
        process = subprocess.Popen(
            ["make", *arguments, "ui", f"PORT={port}"],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group of its own, as in a terminal
        )
    pages = f"http://127.0.0.1:{environment['VPMOE_BROWSE_PORT']}/"
    ui = Ui(home, environment, f"http://127.0.0.1:{port}", pages, process)

    def answers() -> bool:
        assert process.poll() is None, ui.log[-2000:]
        with suppress(OSError):
            urllib.request.urlopen(f"{ui.url}/server_info", timeout=2).read()
            urllib.request.urlopen(pages, timeout=2).read()
            return True
        return False

    try:
        eventually(answers)
        yield ui
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(30)


@pytest.fixture
def seen(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as page:
        yield page


@pytest.fixture
def made(ui: Ui) -> Head:
    """The first data set: of the run that the browser has started, or else of one from the terminal."""
    if not ui.versions(DATA):
        module = ("-m", "vpmoe_assets.definitions")
        ui.run("dagster", "asset", "materialize", *module, "--select", f'+key:"tiny/{DATA}"')
    return ui.versions(DATA)[0]


@pytest.mark.browser
@needs_browser
def test_a_graph_is_materialised_by_a_click_and_its_curve_grows_while_it_trains(
    ui: Ui, seen: Browser
) -> None:
    seen.goto(f"{ui.url}/assets/tiny/{STAGE}?view=lineage&lineageScope=upstream&lineageDepth=5")
    seen.says(STAGE, *BEHIND)
    seen.until(f"document.body.innerText.split('Never materialized').length === {1 + 1 + len(BEHIND)}")
    seen.click("button", "Materialize all")
    eventually(lambda: any(line for line in ui.store.root.glob(f".work/tiny/{STAGE}-*/metrics.jsonl")))
    seen.goto(f"{ui.pages}tiny/")
    seen.says("At work")
    seen.follow("a", STAGE)
    dots = "document.querySelectorAll('figure circle').length"
    seen.until(f"{dots} > 0", 120)
    first = seen.js(dots)
    seen.until(f"{dots} > {first}", 120)  # nobody reloads it
    seen.says("of 10", "Nothing is at work on it now", seconds=240)
    seen.follow("main a")
    seen.says("fresh", "Loss, nats", "resume_drift")
    (version,) = ui.versions(STAGE)
    assert seen.js("location.pathname") == f"/{page_of(version)}"


def test_the_server_tells_description_checks_and_provenance_of_an_asset(ui: Ui, made: Head) -> None:
    node = ui.ask(
        """{ assetNodes(assetKeys: [{path: ["tiny", "synth_kd_v1"]}]) {
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
    assert "loss mask and span of every conversation" in node["description"]
    assert (node["groupName"], "dataset" in node["kinds"]) == ("data", True)
    shown = {entry["label"]: entry for entry in node["assetMaterializations"][0]["metadataEntries"]}
    ancestry = shown["provenance"]["mdStr"]
    assert [name in ancestry for name in BEHIND] == [True] * len(BEHIND)
    assert shown["digest"]["text"] == made.digest
    checks = {check["name"]: check["blocking"] for check in node["assetChecksOrError"]["checks"]}
    assert checks["split_rule"]
    assert not checks["truncation_counts"]


@pytest.mark.browser
@needs_browser
def test_from_an_asset_in_dagsters_ui_to_its_page_and_on_to_the_source(
    ui: Ui, made: Head, seen: Browser
) -> None:
    seen.goto(f"{ui.url}/assets/tiny/{DATA}?view=overview")
    seen.says("Latest check results", "provenance", "fingerprint", "Plots")
    seen.until("document.body.innerText.includes('page') && document.body.innerText.includes('digest')")
    text = seen.text()
    assert text.index("\npage") < text.index("\nprovenance") < text.index("\nfingerprint")
    link = seen.until(f"document.querySelector('a[href^={json.dumps(ui.pages)}]')?.href")
    seen.goto(link)
    seen.says(DATA, "fresh", "split_rule", made.digest)
    seen.follow("a", "synth_harmony")
    seen.follow(".chips a", "synth")
    seen.says("Nothing in the store: it is a source", "Used by")


@pytest.mark.browser
@needs_browser
def test_the_donor_is_walked_to_through_the_lineage_of_a_stage(ui: Ui, seen: Browser) -> None:
    student = publish(ui.store, "qwen3_0_6b", experiment="ladder")
    for rung in ("qwen3_0_6b_o200k", "vpdense_28", "vpmoe", STAGE):
        student = publish(ui.store, rung, (student,), experiment="ladder")
    seen.goto(f"{ui.pages}ladder/{STAGE}/")
    seen.follow("tbody th a")
    seen.follow("nav a", "Lineage")
    seen.follow("svg a", "qwen3_0_6b")
    seen.says("qwen3_0_6b", "used by 4")


@pytest.mark.browser
@needs_browser
def test_a_changed_config_is_told_alike_everywhere_and_the_run_that_follows_is_compared(
    ui: Ui, made: Head, seen: Browser
) -> None:
    before = ui.versions(STAGE)
    toml = ui.home / "tiny.toml"
    assert toml.read_text().count(LR[0]) == 1
    toml.write_text(toml.read_text().replace(*LR))
    assert (
        ui.ask("mutation { reloadWorkspace { __typename } }")["reloadWorkspace"]["__typename"] == "Workspace"
    )
    seen.goto(f"{ui.url}/assets/tiny/{STAGE}?view=overview")
    seen.says("Unsynced")
    reason = "training.optimizer.lr 0.002 → 0.001"
    assert reason in ui.run("vpmoe", "why", STAGE)
    seen.goto(f"{ui.pages}{page_of(before[-1])}")
    seen.says("stale", reason)
    seen.goto(f"{ui.pages}tiny/")
    seen.says(reason)

    seen.goto(f"{ui.url}/assets/tiny/{STAGE}?view=overview")
    seen.says("Unsynced", "Latest check results", "resume_drift")  # before that a click does nothing
    seen.click("button", "Materialize")
    eventually(lambda: len(ui.versions(STAGE)) == len(before) + 1)
    seen.goto(f"{ui.pages}tiny/{STAGE}/")
    seen.follow("a", "what changed")
    seen.says("training.optimizer.lr", "0.001", "0.002", "valid_loss")
    assert seen.js("document.querySelectorAll('polyline').length") >= 2
    old, new = (f"tiny/{STAGE}@{head.version}" for head in ui.versions(STAGE))
    lines = ui.run("vpmoe", "diff", old, new, code=1).splitlines()  # something differs
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110


def test_ctrl_c_ends_every_process(ui: Ui) -> None:
    # A run whose version is there still draws and judges; interrupted in that, it would rightly say so.
    at_work = "{runsOrError(filter: {statuses: [QUEUED, STARTING, STARTED]}) {... on Runs {results {id}}}}"
    eventually(lambda: not ui.ask(at_work)["runsOrError"]["results"])
    started = psutil.Process(ui.process.pid).children(recursive=True)
    assert len(started) >= 4, "Dagster's server, its daemon, the code, and the pages"
    os.killpg(ui.process.pid, signal.SIGINT)
    ui.process.wait(60)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, [process.cmdline() for process in alive]
    assert "Traceback" not in ui.log
