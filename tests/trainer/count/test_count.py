import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.trainer.contract.test_distillation_schema import experiment
from trainer.__main__ import main
from trainer.contract.schema.experiment import CONFIGS_DIR
from trainer.contract.tokens import run_tokens, store_size
from trainer.count import command


def count(*arguments: str) -> int:
    return main(["count", *arguments])


def test_prints_json(capsys):
    assert count("bench", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["experiment"] == "bench"
    rung = report["rungs"]["vpmoe"]
    assert (rung["total"], rung["active"], rung["active_non_embedding"]) == (
        6_021_784_719,
        780_087_951,
        368_259_727,
    )
    assert sum(rung["components"].values()) == rung["total"]
    plans = rung["memory_bytes_per_gpu"]
    assert [(plan["dp"], plan["sharded"]) for plan in plans] == list(command.LAYOUTS)
    entries = ("state", "activations", "work")
    assert all(plan["total"] == sum(plan[entry] for entry in entries) for plan in plans)
    disk = rung["disk_bytes"]["vpmoe_stage1"]
    assert disk["total"] == disk["checkpoints"] * disk["checkpoint"] + disk["weights"]


def test_prints_tables(capsys):
    assert count("full", "--rung", "vpdense_80") == 0
    printed = capsys.readouterr().out
    assert "676,943,631" in printed
    assert "DP=8, sharded" in printed
    assert "vpdense_80_healed" in printed
    assert "vpmoe" not in printed


def test_plans_the_layout_that_is_asked_for(capsys):
    assert count("bench", "--dp", "4", "--tp", "2", "--ep", "2", "--json") == 0
    (plan,) = json.loads(capsys.readouterr().out)["rungs"]["vpmoe"]["memory_bytes_per_gpu"]
    assert {key: plan[key] for key in ("dp", "tp", "ep", "sharded")} == {
        "dp": 4,
        "tp": 2,
        "ep": 2,
        "sharded": True,
    }
    assert plan["weights"] < 0.52 * 2 * 6_021_784_719


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch"], "nonesuch"),
        (["smoke", "--rung", "vpdense_81"], "vpdense_81"),
        (["smoke", "--rung", "qwen3_0_6b_o200k"], "has no geometry of its own"),
        (["bench", "--tp", "3"], "execution.tp = 3 does not divide model.num_query_groups = 2"),
        (["bench", "--dp", "3", "--ep", "2"], "ep = 2 does not divide dp = 3"),
        (["full", "--rung", "vpdense_80", "--dp", "2", "--ep", "2"], "the model has no experts"),
        (["bench", "--dp", "0"], "dp"),
        (["bench", "--dp", "9" * 30], "dp: found 999999999999999999999999999999; input should be less"),
    ],
)
def test_explains_what_it_cannot_count(arguments, message, capsys):
    assert count(*arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_takes_a_path(tmp_path: Path, capsys):
    text = (CONFIGS_DIR / "bench.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(
        text.replace('name = "bench"', 'name = "mine"').replace("num_experts = 256", "num_experts = 128")
    )
    assert tomllib.loads(path.read_text())["rungs"]["vpmoe"]["moe"]["num_experts"] == 128
    assert count(str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rungs"]["vpmoe"]["total"] < 4_000_000_000


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_nothing_heavy_is_loaded(arguments):
    program = (
        "import sys; from trainer.__main__ import main; code = main(['count', 'full', *sys.argv[1:]]); "
        "print(code, sorted({'torch', 'megatron', 'numpy', 'wandb'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_the_tokens_of_a_run_are_those_of_its_samples_by_kind():
    found = run_tokens(experiment())
    assert list(found)[-4:] == ["vpmoe_stage1", "teacher", "vpmoe_stage2", "vpmoe_stage3"]
    stage2, stage3 = found["vpmoe_stage2"], found["vpmoe_stage3"]
    assert stage2.tokens == 6 * 2 * 1024
    assert stage2.by_kind == {"scored": round(0.7 * 12288), "conversations": round(0.3 * 12288)}
    assert sum(stage3.by_kind.values()) == stage3.tokens == 4 * 2 * 1024
    assert found["teacher"].steps == 20


def test_the_store_is_planned_from_the_rows_that_are_scored():
    size = store_size(experiment({"stages.teacher_topk.tail_draws": 0}))
    assert size.conversations == 2000 * 0.1 + 2000 * 0.9 * 0.2
    assert size.tokens == pytest.approx(size.conversations * 856 * 0.831, rel=1e-6)
    assert size.plain_bytes_per_token == 32 * (4 + 2)
    assert size.plain_bytes == size.tokens * 192
    assert size.bytes == pytest.approx(size.tokens * size.bytes_per_token, abs=1)
    assert 0.3 < size.bytes_per_token / 192 < 0.42
    with_draws = store_size(experiment())
    assert with_draws.plain_bytes_per_token == 192 + 8 * 4
    assert with_draws.bytes_per_token < 0.5 * 192
    folder = {"kind": "parquet", "path": "rows"}
    unknown = store_size(experiment({"sources.synth": folder}))
    assert set(unknown.as_dict()) == {"bytes_per_token", "plain_bytes_per_token"}
    capped = store_size(experiment({"sources.synth": folder, "data.synth_kd_v1.max_rows": 1000}))
    assert capped.conversations == 1000 * 0.1 + 1000 * 0.9 * 0.2


def test_prints_the_tokens_of_runs_and_no_store_where_there_is_none(capsys):
    assert count("bench", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"]["vpmoe_stage1"]["by_kind"].keys() == {"conversations"}
    assert "teacher_topk" not in report
    command.print_distillation(experiment())
    printed = capsys.readouterr().out
    assert "int32 + fp16" in printed
    assert "vpmoe_stage3" in printed
