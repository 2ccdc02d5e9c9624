"""The UI's port: the usual one, the next one that is free, or the one that was asked for, never one taken."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vpmoe_assets import port
from vpmoe_assets.project import ROOT


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind((port.HOST, 0))
        other.listen()
        yield other.getsockname()[1]


def free() -> int:
    with socket.socket() as probe:
        probe.bind((port.HOST, 0))
        return int(probe.getsockname()[1])


def test_where_the_usual_port_is_taken_it_is_the_next_and_is_told(taken, monkeypatch, capsys):
    other = free()
    monkeypatch.setattr(port, "USUAL", [taken, other])
    assert port.main([""]) == 0
    said = capsys.readouterr()
    assert said.out == f"{other}\n"
    assert f"port {taken} is taken; the UI will be on http://127.0.0.1:{other}" in said.err


def test_the_usual_port_is_taken_without_a_word(monkeypatch, capsys):
    usual = free()
    monkeypatch.setattr(port, "USUAL", [usual])
    assert port.main([]) == 0
    assert capsys.readouterr() == (f"{usual}\n", "")


def test_a_port_that_was_asked_for_is_had_or_refused_by_name(taken, capsys):
    asked = free()
    assert port.main([str(asked)]) == 0
    assert capsys.readouterr() == (f"{asked}\n", "")
    assert port.main([str(taken)]) == 1
    assert f"error: port {taken} is taken: choose another" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["abc", "0", "65536", "-1", "8080x", "١٢", "9" * 5000, "1 2"])
def test_what_is_no_port_is_refused(wrong, capsys):
    assert port.main([wrong]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_all_usual_ports_taken_is_a_message(taken, monkeypatch, capsys):
    monkeypatch.setattr(port, "USUAL", [taken])
    assert port.main([]) == 1
    assert "make ui PORT=8080" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("wanted", ["TAKEN", "a'b; echo run"])
def test_make_ui_starts_no_server_on_a_port_it_cannot_have(taken, wanted, tmp_path):
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "python").symlink_to(sys.executable)
    (directory / "dagster").write_text("#!/bin/sh\necho a server $*\n")
    (directory / "dagster").chmod(0o755)
    port_of = f"PORT={taken if wanted == 'TAKEN' else wanted}"
    done = subprocess.run(
        ["make", "-o", "README.md", "-o", ".env", "ui", f"BIN={directory}", "STAMP=README.md", port_of],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "server" not in done.stdout
    assert "run" not in done.stdout.split("\n")
