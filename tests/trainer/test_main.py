"""The command line: help without torch, exit codes, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_shows_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node" in text
    assert "75" in text


def test_help_and_wrong_arguments_import_neither_torch_nor_pydantic():
    code = (
        "import sys\n"
        "from trainer.__main__ import main\n"
        "try:\n    main(['train'])\n"
        "except SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert not {'torch', 'megatron', 'pydantic', 'wandb'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--job" in done.stderr


def test_commands_that_do_not_exist_are_not_offered(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["fly"])
    assert stop.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_missing_job_file_is_named(tmp_path, capsys):
    assert main(["train", "--job", str(tmp_path / "none.json")]) == 1
    assert str(tmp_path / "none.json") in capsys.readouterr().err


def test_a_job_with_an_unknown_key_is_refused_before_any_work(tmp_path, capsys):
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"schema": "vpmoe.job/1", "commandd": "train", "work_dir": str(tmp_path / "work")})
    )
    assert main(["train", "--job", str(job)]) == 1
    error = capsys.readouterr().err
    assert "commandd" in error
    assert "'command'" in error
    assert not (tmp_path / "work").exists()


def test_threads_wait_passively_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["train", "--job", str(tmp_path / "none.json")])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["train", "--job", str(tmp_path / "none.json")])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
