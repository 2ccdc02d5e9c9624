"""The convert command: what it delivers, what it refuses, and what it leaves when it is cut short."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.surgery.surgery_cases import (
    convert_job,
    expand_recipe,
    files,
    morphed,
    payload,
    publish_as,
    run,
    status,
    summary,
)
from trainer.__main__ import main
from trainer.checkpoints.published import read_architecture
from trainer.contract.files import replace_text
from trainer.contract.schema.base import plain
from trainer.contract.schema.rungs.ladder import RECIPES
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.surgery.weights import WeightsReader, WeightsWriter


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return publish_as(morphed(num_layers=4), tmp_path_factory.mktemp("job") / "parent", "fp32")


@pytest.fixture
def own_parent(parent, tmp_path):
    return Path(shutil.copytree(parent, tmp_path / "parent"))


def recipe(**changes):
    return expand_recipe(4, 8) | changes


def nothing_delivered(job) -> bool:
    output = Path(job.output_dir)
    return not payload(job).exists() and not (output / "summary.json").exists()


def test_a_finished_conversion_says_all_there_is_to_say(parent, tmp_path):
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_DONE
    assert status(job) == "done"
    assert sorted(path.name for path in Path(job.output_dir).iterdir()) == [
        "modules.json",
        "payload",
        "summary.json",
    ]
    assert read_architecture(payload(job)) == morphed(num_layers=8)
    report = summary(job)
    assert report["payload"] == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert report["step"] == "expand"
    assert report["peak_rss_bytes"] > 2**20
    assert report["checks"]["reload"]["metadata"]["tensors"] == len(WeightsReader(payload(job)).names)
    assert [row["layer"] for row in report["layers"]] == list(range(1, 9))
    assert len({tuple(row) for row in report["layers"]}) == 1, "rows of the table have equal keys"
    record = report["provenance"]
    assert record["object_id"] == "rung"
    assert record["seed"] == 1234
    assert record["code"]["git_sha"] == "a" * 40
    assert record["inputs"][0]["id"] == "parent"
    assert record["inputs"][0]["digest"] == "d" * 64
    assert record["source"]["rope_theta"] == 1e6
    assert record["student_spec"]["num_layers"] == 8
    assert record["tokenizer"]["vocab_size_padded"] == 96
    assert record["checks"] == {"reload": True, "logits_bit_identical": True}


def test_a_model_that_overflows_fails_its_checks_and_the_report_can_be_read(own_parent, tmp_path):
    file = own_parent / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["decoder.layers.2.mlp.linear_fc1.bias"].fill_(1e30)
    save_file(tensors, file, metadata={"format": "pt"})
    job = convert_job(tmp_path, recipe(), parent=own_parent)
    assert run(job) == EXIT_DONE
    report = summary(job)
    assert not report["checks"]["logits_bit_identical"]["passed"]
    assert any(row["residual_change"] is None for row in report["layers"])


def test_nothing_in_the_payload_tells_when_or_where_it_was_made(parent, tmp_path):
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_DONE
    for content in files(payload(job)).values():
        assert str(tmp_path).encode() not in content
        assert b"unix" not in content


def test_a_missing_shard_is_named(own_parent, tmp_path, capsys):
    (own_parent / "model-00001-of-00001.safetensors").unlink()
    job = convert_job(tmp_path, recipe(), parent=own_parent)
    assert run(job) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "1 of 1 weight files missing: model-00001-of-00001.safetensors" in error
    assert status(job).startswith("failed: ")
    assert nothing_delivered(job)


def test_a_cut_file_is_named_with_its_size(own_parent, tmp_path, capsys):
    file = own_parent / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert run(convert_job(tmp_path, recipe(), parent=own_parent)) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "model-00001-of-00001.safetensors: not a whole safetensors file" in error
    assert f"{file.stat().st_size} bytes found" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parent": plain(morphed(num_layers=8)), "architecture": plain(morphed(num_layers=16))},
            "num_layers: 8",
        ),
        ({"parent_dtype": "bf16"}, "dtype: 'bfloat16' expected, 'float32' found"),
    ],
)
def test_another_geometry_or_type_than_the_recipes_is_refused(changes, message, parent, tmp_path, capsys):
    job = convert_job(tmp_path, recipe(**changes), parent=parent)
    assert run(job) == EXIT_FAILED
    assert message in capsys.readouterr().err
    assert nothing_delivered(job)


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(own_parent, tmp_path, capsys):
    file, index = own_parent / "model-00001-of-00001.safetensors", own_parent / "model.safetensors.index.json"
    tensors = load_file(file)
    del tensors["decoder.layers.1.mlp.linear_fc1.weight"]
    tensors["decoder.layers.9.stray"] = torch.zeros(3)
    tensors["decoder.final_layernorm.weight"] = torch.zeros(7)
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    assert run(convert_job(tmp_path, recipe(), parent=own_parent)) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "1 tensors missing: decoder.layers.1.mlp.linear_fc1.weight" in error
    assert "1 tensors not expected: decoder.layers.9.stray" in error
    assert "decoder.final_layernorm.weight: F32 [32] expected, F32 [7] found" in error


def test_an_index_that_names_another_file_is_refused(own_parent, tmp_path, capsys):
    index = own_parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["decoder.layers.77.ghost"] = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps(content))
    assert run(convert_job(tmp_path, recipe(), parent=own_parent)) == EXIT_FAILED
    assert "decoder.layers.77.ghost is in no file" in capsys.readouterr().err


def test_a_parent_with_nan_is_refused_by_name(own_parent, tmp_path, capsys):
    file = own_parent / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["decoder.layers.2.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(convert_job(tmp_path, recipe(), parent=own_parent)) == EXIT_FAILED
    assert "input_layernorm.weight: NaN or infinity" in capsys.readouterr().err


def test_a_bit_that_flips_on_the_disk_is_found_before_delivery(parent, tmp_path, monkeypatch, capsys):
    finish = WeightsWriter.finish

    def flip(writer: WeightsWriter) -> None:
        finish(writer)
        file = writer.directory / "model-00001-of-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 16
        file.write_bytes(content)

    monkeypatch.setattr(WeightsWriter, "finish", flip)
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_FAILED
    assert "read back from" in capsys.readouterr().err
    assert nothing_delivered(job)
    monkeypatch.undo()
    assert run(job) == EXIT_DONE


def test_output_that_exists_is_not_written_over(parent, tmp_path, capsys):
    job = convert_job(tmp_path, recipe(), parent=parent)
    payload(job).mkdir(parents=True)
    (payload(job) / "precious").write_text("mine")
    assert run(job) == EXIT_FAILED
    assert "a conversion is never written over" in capsys.readouterr().err
    assert [path.name for path in payload(job).iterdir()] == ["precious"]


def test_an_output_directory_that_was_made_beforehand_is_filled(parent, tmp_path, capsys):
    job = convert_job(tmp_path, recipe(), parent=parent)
    payload(job).mkdir(parents=True)
    assert run(job) == EXIT_DONE
    assert "interrupted" not in capsys.readouterr().err


def test_help_names_every_step(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {step} " in text for step in RECIPES)
    assert "python -m trainer convert --job job.json" in text


def test_finished_output_of_another_recipe_is_not_written_over_and_ones_own_is_not_made_again(
    parent, tmp_path, capsys
):
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_DONE
    before = files(payload(job)), (Path(job.output_dir) / "summary.json").read_bytes()
    assert run(job.model_copy(update={"recipe_fingerprint": "0" * 64})) == EXIT_FAILED
    assert "finished output of another job" in capsys.readouterr().err
    assert run(job) == EXIT_DONE
    assert "finished by an earlier start" in capsys.readouterr().err
    assert (files(payload(job)), (Path(job.output_dir) / "summary.json").read_bytes()) == before


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_tensors_and_the_next_start_gives_the_same_bytes(
    name, parent, tmp_path, monkeypatch, capsys
):
    whole = convert_job(tmp_path, recipe(), "whole", parent=parent)
    whole = whole.model_copy(update={"experiment": "another"})
    assert run(whole) == EXIT_DONE
    write, seen = WeightsWriter.write, []

    def stop_at_the_ninth(writer: WeightsWriter, tensor: str, value: torch.Tensor) -> None:
        seen.append(tensor)
        if len(seen) == 9:
            os.kill(os.getpid(), name)
        write(writer, tensor, value)

    monkeypatch.setattr(WeightsWriter, "write", stop_at_the_ninth)
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_INTERRUPTED
    assert len(seen) == 9
    assert status(job) == "interrupted"
    assert f"stopped by {name.name}" in capsys.readouterr().err
    assert list(Path(job.output_dir).iterdir()) == [], "what is worthless is not left lying about"
    monkeypatch.undo()
    assert run(job) == EXIT_DONE
    assert files(payload(job)) == files(payload(whole))
    assert sorted(path.name for path in Path(job.output_dir).iterdir()) == [
        "modules.json",
        "payload",
        "summary.json",
    ]


class KilledError(SystemExit):
    """Ends a job at once, as SIGKILL would: nobody cleans up. A job passes on what ends the interpreter."""


@pytest.mark.parametrize("moment", ["model.safetensors.index.json", "summary.json"])
def test_a_conversion_that_was_killed_is_started_over(moment, parent, tmp_path, monkeypatch, capsys):
    def kill(*_: object) -> None:
        raise KilledError

    def replace(path: Path, text: str) -> None:
        if path.name == moment:
            kill()
        replace_text(path, text)

    if moment == "summary.json":
        monkeypatch.setattr("trainer.job.deliverable.replace_text", replace)
    else:
        monkeypatch.setattr("trainer.surgery.weights.write_index", kill)
    job = convert_job(tmp_path, recipe(), parent=parent)
    with pytest.raises(KilledError):
        run(job)
    assert payload(job).is_dir() == (moment == "summary.json")
    assert not (Path(job.output_dir) / "summary.json").exists()
    monkeypatch.undo()
    assert run(job) == EXIT_DONE
    assert "removed what an interrupted conversion left" in capsys.readouterr().err
    assert summary(job)["checks"]["logits_bit_identical"]["passed"]
    assert sorted(path.name for path in Path(job.output_dir).iterdir()) == [
        "modules.json",
        "payload",
        "summary.json",
    ]


def test_the_interrupted_work_of_another_job_is_left_alone(parent, tmp_path, capsys):
    job = convert_job(tmp_path, recipe(), parent=parent)
    output = Path(job.output_dir)
    (output / ".payload.writing").mkdir(parents=True)
    (output / ".converting").write_text("smoke/other 0000\n")
    assert run(job) == EXIT_FAILED
    assert "interrupted conversion of another job (smoke/other)" in capsys.readouterr().err
    assert (output / ".payload.writing").is_dir()


def test_a_full_disk_is_met_before_any_work(parent, tmp_path, monkeypatch, capsys):
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    job = convert_job(tmp_path, recipe(), parent=parent)
    assert run(job) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "bytes needed" in error
    assert nothing_delivered(job)
