"""The page of a profile, its rows in the index, and the checks that hold a profile to what it says."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vpmoe_assets.assets.perf import figures
from vpmoe_assets.checks import perf
from vpmoe_assets.errors import DataError
from vpmoe_assets.speed import PLOTS, headline, images, markdown, page, read_profile, write_pages

REPORT: dict[str, Any] = {
    "schema_version": "vpmoe.profile/1",
    "device": "cuda",
    "note": None,
    "gpu_name": "NVIDIA H100 80GB HBM3",
    "gpu_cc": "90",
    "hw_tag": "nvidia_h100_80gb_hbm3_sm90",
    "run_name": "vpmoe_sl2048_mb1_tp1_ep1_pp1_n1",
    "transformer_impl": "fused",
    "dtype": "bf16",
    "num_layers": 80,
    "data": "mock",
    "cuda_graphs": True,
    "steps_measured": 20,
    "warmup_steps": 9,
    "set_up_s": 60.0,
    "ms_per_step": {"mean": 100.0, "p50": 99.0, "p95": 110.0},
    "ms": {"forward": 30.0, "optimizer": 50.0, "rest": 20.0},
    "parts_ms": {"forward": 30.0, "AdamW": 50.0, "<statistics>": 20.0},
    "tokens_per_s": 20480.0,
    "tokens_per_s_per_gpu": 20480.0,
    "mfu": 0.08,
    "mfu_of_measured_rate": 0.11,
    "optimizer_share": 0.5,
    "peak_mem_bytes": 70 << 30,
    "reserved_mem_bytes": 72 << 30,
    "gpu_ops_per_step": 9000,
    "gpu_busy_ms_per_step": 98.0,
    "rates": {"product_flops_per_s": 7e14, "copy_bytes_per_s": 2.9e12, "sheet_flops_per_s": 9.894e14},
    "layers": {
        "measured_on": "one step without CUDA graphs, whose kernels are the same",
        "time": "kernels",
        "kinds": [
            {"kind": "experts", "ms": 40.0, "forward_ms": 10.0, "backward_ms": 30.0, "floor_ms": 16.0},
            {"kind": "other", "ms": 2.0, "forward_ms": 1.0, "backward_ms": 1.0, "floor_ms": None},
        ],
    },
}
CPU = {
    **REPORT,
    **{"device": "cpu", "gpu_name": None, "mfu": None, "hw_tag": "cpu", "note": "CPU figures: of no GPU"},
    **{"tokens_per_s_per_gpu": None, "reserved_mem_bytes": None, "gpu_ops_per_step": None},
    "gpu_busy_ms_per_step": None,
}


def published(tmp_path: Path, report: dict[str, Any], device: str = "cuda") -> Any:
    (tmp_path / "profile.json").write_text(json.dumps(report))
    return SimpleNamespace(payload=tmp_path, record=SimpleNamespace(execution={"device": device}))


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | changes


def test_the_index_has_every_figure_that_there_is_with_device_and_shape():
    rows = {figure.name: figure for figure in figures(REPORT)}
    assert rows["tokens_per_s"].value == 20480
    assert rows["kinds/experts"].unit == "ms"
    assert "floors/other" not in rows, "a floor that is not known is no number"
    assert {figure.device for figure in rows.values()} == {"NVIDIA H100 80GB HBM3"}
    assert rows["mfu"].context["transformer_impl"] == "fused"
    of_a_cpu = {figure.name: figure.device for figure in figures(CPU)}
    assert set(of_a_cpu.values()) == {"cpu"}
    assert not {"mfu", "gpu_ops_per_step", "reserved_mem_bytes"} & of_a_cpu.keys()


def test_the_page_is_whole_in_itself_says_where_it_was_measured_and_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_pages(REPORT, tmp_path / name)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two
    assert one.keys() == {"perf.md", *PLOTS}
    text = page(REPORT, images(tmp_path / "one"), "bench: a training step")
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text
    assert "&lt;statistics&gt;" in text
    assert "| experts | 40.00 | 10.00 | 30.00 | 16.00 | 2.5 |" in markdown(REPORT)
    assert "8.0% of the card's FLOP/s" in headline(REPORT)
    assert "CPU, whose figures say nothing about a GPU" in headline(CPU)


def test_a_report_of_another_format_is_refused(tmp_path):
    (tmp_path / "profile.json").write_text('{"schema_version": "vpmoe.profile/9"}')
    with pytest.raises(DataError, match=r"schema_version = 'vpmoe.profile/9'; known is 'vpmoe.profile/1'"):
        read_profile(tmp_path)


@pytest.mark.parametrize(
    ("report", "device", "passed", "said"),
    [
        (REPORT, "cuda", True, "9000 operations"),
        (CPU, "cpu", True, "of a CPU"),
        (CPU, "cuda", False, "was to run on cuda"),
        (changed(gpu_ops_per_step=0), "cuda", False, "no kernel"),
        ({**CPU, "note": None}, "cpu", False, "does not say"),
    ],
)
def test_a_profile_without_device_events_is_blocked(tmp_path, report, device, passed, said):
    verdict = perf.device_events_present.run(published(tmp_path, report, device), {})
    assert (verdict.passed, perf.device_events_present.blocking) == (passed, True)
    assert said in verdict.description


def test_parts_that_do_not_add_up_and_what_beats_the_device_are_warned_of(tmp_path):
    assert perf.parts_add_up.run(published(tmp_path, REPORT), {}).passed
    short = changed(parts_ms={"forward": 30.0})
    assert "the parts take 30.00 ms" in perf.parts_add_up.run(published(tmp_path, short), {}).description
    fast = changed()
    fast["layers"]["kinds"][0]["ms"] = 3.0
    assert "experts took 3.000 ms" in perf.parts_add_up.run(published(tmp_path, fast), {}).description
    slow_machine = copy.deepcopy(CPU)
    slow_machine["layers"]["kinds"][0]["ms"] = 3.0
    assert perf.parts_add_up.run(published(tmp_path, slow_machine), {}).passed


def test_a_page_of_another_profile_and_a_torn_plot_are_found(tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "report").mkdir()
    inputs = {"perf_profile": published(tmp_path / "profile", REPORT)}
    item: Any = SimpleNamespace(payload=tmp_path / "report")
    write_pages(REPORT, item.payload)
    assert perf.report_is_of_its_profile.run(item, inputs).passed
    (item.payload / PLOTS[1]).write_bytes((item.payload / PLOTS[1]).read_bytes()[:-9])
    assert "kinds.png is no whole PNG" in perf.report_is_of_its_profile.run(item, inputs).description
    write_pages(CPU, item.payload)
    assert "of another profile" in perf.report_is_of_its_profile.run(item, inputs).description
