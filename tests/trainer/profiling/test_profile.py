"""A profile of a tiny model on a CPU: its report, where it puts time, and what it leaves where."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.profiling.profiles import profile_job, run
from trainer.contract.schema.job import Job
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.model import router as routing
from trainer.profiling.profile import profile

SUMMARY = {
    *("steps_measured", "warmup_steps", "ms_per_step", "tokens_per_s", "tokens_per_s_per_gpu", "ms"),
    *("optimizer_share", "peak_mem_bytes", "reserved_mem_bytes", "gpu_ops_per_step", "top_ops"),
    *("router_agg", "loss_first", "loss_last", "grad_norm_last"),
}
META = {
    *("created_utc", "run_dir", "run_id", "run_name", "run_tag", "profile_tool", "profile_step_start"),
    *("profile_step_end", "git_sha", "config_path", "config_sha256", "tokenizer_path", "tokenizer_sha256"),
    *("transformer_impl", "seq_len", "micro_batch_size", "global_batch_size", "nproc_per_node"),
    *("tp", "pp", "ep", "dp", "hw_tag", "gpu_name", "gpu_cc", "train_cmd"),
}
KINDS = {
    *(
        "window attention",
        "global attention",
        "experts",
        "router",
        "TPA projections",
        "head and loss",
        "norms",
    ),
    *("QKV projections", "output projections", "shared experts", "embedding", "optimizer", "dense FFN"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = profile_job(tmp_path_factory.mktemp("profile"))
    left = Path(job.output_dir) / "payload/of an earlier attempt"
    left.parent.mkdir(parents=True)
    left.touch()
    run(job, keep_traces=True)
    return job


def read(job: Job, name: str = "payload/profile.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(job.output_dir) / name).read_bytes())
    return found


def test_a_report_has_the_keys_of_the_profiling_contract_and_says_that_it_is_of_a_cpu(made):
    content, enveloped = read(made), read(made, "run.profile.json")
    assert content.keys() >= SUMMARY
    assert enveloped.keys() >= META
    assert content.items() <= enveloped.items()
    assert (content["device"], content["gpu_name"], content["mfu"]) == ("cpu", None, None)
    assert "CPU figures" in content["note"]
    assert content["steps_measured"] == 2
    assert content["profile_step_start"] == 4
    assert 0 < content["loss_last"] < content["loss_first"] + 1
    assert content["router_agg"]["moe/router_agg/mean_entropy"] > 0


def test_a_payload_says_nothing_of_time_host_or_path(made):
    text = (Path(made.output_dir) / "payload/profile.json").read_text()
    assert str(Path(made.output_dir).parent) not in text
    assert not re.search(r"20\d\d-\d\d-\d\d|a{40}", text)


def test_parts_of_a_step_add_up_to_it_and_every_kind_of_layer_has_its_time(made):
    content = read(made)
    assert sum(content["parts_ms"].values()) == pytest.approx(content["ms_per_step"]["mean"], rel=1e-3)
    assert sum(content["ms"].values()) == pytest.approx(content["ms_per_step"]["mean"], rel=1e-3)
    assert {"forward", "loss", "backward", "gradient norm", "AdamW", "data"} <= content["parts_ms"].keys()
    rows = {row["kind"]: row for row in content["layers"]["kinds"]}
    assert rows.keys() >= KINDS
    both_ways = KINDS - {"optimizer"}
    assert all(rows[kind]["forward_ms"] > 0 and rows[kind]["backward_ms"] > 0 for kind in both_ways)
    assert all(rows[kind]["floor_ms"] > 0 for kind in KINDS)
    total = sum(row["ms"] for row in rows.values())
    assert rows.get("other", {"ms": 0})["ms"] < 0.05 * total, "hardly anything has no place"


def test_raw_traces_stay_in_the_work_directory_and_nothing_of_an_earlier_attempt_is_left(made):
    raw = list(Path(made.work_dir).glob(".traces/*"))
    assert [path.name for path in raw] == ["step.rank_0.json"]
    named = {event.get("name") for event in json.loads(raw[0].read_text())["traceEvents"]}
    assert {"vpmoe: router", "vpmoe: experts", "vpmoe: backward"} <= named
    left = {path.name for path in Path(made.output_dir).rglob("*") if path.is_file()}
    assert left == {"profile.json", "run.profile.json", "summary.json", "modules.json"}


def test_steps_are_logged_with_their_parts(made):
    lines = [json.loads(line) for line in (Path(made.work_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert all(line["ms/forward"] > 0 for line in lines)


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        wide = torch.ones(700, 700)
        for _ in range(4):
            wide = wide @ wide / 700
        return gradient + 0 * wide[0, 0]


def test_work_that_a_router_does_going_back_is_counted_as_the_routers(tmp_path, monkeypatch):
    """The oracle is work put in on purpose: autograd runs it out of any range."""
    original = routing.Router.forward
    monkeypatch.setattr(
        routing.Router,
        "forward",
        lambda self, hidden, *rest: original(self, _SlowBackward.apply(hidden), *rest),
    )
    job = profile_job(tmp_path)
    run(job)
    rows = {row["kind"]: row for row in read(job)["layers"]["kinds"]}
    back = rows["router"]["backward_ms"]
    assert back > 5 * rows["router"]["forward_ms"]
    assert back > 3 * rows["experts"]["backward_ms"]


def test_a_stop_that_is_asked_for_is_heard_between_steps(tmp_path):
    from trainer.job.lifecycle import Interrupted

    job, stop = profile_job(tmp_path), StopRequest()
    stop.received = "SIGINT"
    with pytest.raises(Interrupted, match="measures from the beginning"):
        profile(job, WorkDir(Path(job.work_dir)), stop)
    assert not Path(job.output_dir, "summary.json").exists()


def test_a_process_that_a_recorder_watches_times_its_steps_and_delivers_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("VPMOE_UNDER_NSYS", "1")
    job = profile_job(tmp_path)
    run(job)
    timed = [json.loads(line) for line in (Path(job.work_dir) / "metrics.jsonl").read_text().splitlines()]
    assert len(timed) == 2
    assert not Path(job.output_dir).exists()
