"""The report of a profile: figures of one device and one run, with the least that each could be.

Two forms, as an evaluation's: `profile.json` in the payload holds what was measured and on what kind of
device, without time, host or path; `run.profile.json` beside it is the same in the envelope of its run.
Timings are no reproducible bytes: two runs of one recipe make two payloads.
"""

import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.provenance import config_hash
from trainer.contract.canonical import canonical_json
from trainer.contract.credentials import redact_command
from trainer.contract.files import replace_text
from trainer.contract.parameters import count_parameters
from trainer.contract.schema.base import plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.profile import ProfileRecipe
from trainer.job.distributed import Layout
from trainer.profiling.measured import Measured
from trainer.profiling.rates import Rates
from trainer.profiling.timeline import GROUPS, grouped
from trainer.profiling.work import OPTIMIZER, Work, model_flops, step_work

SCHEMA = "vpmoe.profile/1"
NAME = "profile.json"
ENVELOPED_NAME = "run.profile.json"


def compose(recipe: ProfileRecipe, layout: Layout, measured: Measured, rates: Rates) -> dict[str, Any]:
    """Put a report together.

    Args:
        recipe: What was run.
        layout: Where, on how many ranks; times are those of this rank.
        measured: What was found.
        rates: What the device can do.

    Returns:
        JSON values, those of the summary of a profile: milliseconds, bytes, tokens per second.
    """
    training, cuda = recipe.training, layout.device.type == "cuda"
    step = mean_and_spread(measured.step_ms)
    tokens = training.global_batch_size * recipe.seq_len
    ms = grouped(measured.parts_ms)
    work, ranks = step_work(recipe), layout.world
    flops, seconds = model_flops(work), step["mean"] / 1000
    last = measured.steps[-1]
    router = {name: value for name, value in last.metrics.items() if name.startswith("moe/router_agg/")}
    return {
        "schema_version": SCHEMA,
        "device": layout.device.type,
        "note": None if cuda else "CPU figures: they say nothing about a GPU",
        "run_name": run_name(recipe, layout),
        **device_of(layout.device),
        "profile_tool": "torch profiler",
        "profile_step_start": recipe.warm_up_steps + recipe.timed_steps + 1,
        "profile_step_end": recipe.warm_up_steps + recipe.timed_steps + 1 + measured.graphs,
        "transformer_impl": training.backend,
        "dtype": training.dtype,
        "num_layers": recipe.architecture.model.num_layers,
        "parameters": count_parameters(recipe.architecture).total,
        "seq_len": recipe.seq_len,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "nproc_per_node": ranks,
        **{name: layout.describe()[name] for name in ("dp", "tp", "ep", "pp")},
        "data": "mock",
        "cuda_graphs": measured.graphs,
        "warmup_steps": recipe.warm_up_steps,
        "steps_measured": len(measured.step_ms),
        "set_up_s": round(measured.set_up_s, 3),
        "ms_per_step": {name: round(value, 4) for name, value in step.items()},
        "tokens_per_step": tokens,
        "tokens_per_s": round(tokens / seconds, 2),
        "tokens_per_s_per_gpu": round(tokens / seconds / ranks, 2) if cuda else None,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "parts_ms": {name: round(value, 4) for name, value in measured.parts_ms.items()},
        "optimizer_share": round(ms["optimizer"] / step["mean"], 4),
        "peak_mem_bytes": measured.peak_bytes,
        "reserved_mem_bytes": measured.reserved_bytes,
        "gpu_ops_per_step": measured.traced.operations,
        "gpu_busy_ms_per_step": _rounded(measured.traced.busy_ms),
        "top_ops": measured.traced.dearest,
        "flops_per_step": flops,
        "flops_per_token": round(flops / tokens),
        "mfu": _share(flops, seconds, ranks, rates.sheet_flops_per_s),
        "mfu_of_measured_rate": _share(flops, seconds, ranks, rates.flops_per_s),
        "rates": {
            "sheet_flops_per_s": rates.sheet_flops_per_s,
            "product_flops_per_s": round(rates.flops_per_s),
            "copy_bytes_per_s": round(rates.bytes_per_s),
        },
        "layers": {
            "measured_on": "one step without CUDA graphs, whose kernels are the same"
            if measured.graphs
            else "the traced step",
            "time": "kernels" if cuda else "operations on the CPU",
            "kinds": kinds_table(measured, work, rates, ranks, ms["optimizer"]),
        },
        "router_agg": router,
        "loss_first": measured.steps[0].loss,
        "loss_last": last.loss,
        "grad_norm_last": last.grad_norm,
    }


def kinds_table(
    measured: Measured, work: Mapping[str, Work], rates: Rates, ranks: int, optimizer_ms: float
) -> list[dict[str, Any]]:
    """Return the time of each kind of layer beside the least that this device could take, dearest first.

    A floor counts the arithmetic at the rate of one large product and the memory at the rate of one large
    copy, both measured in this run. The optimizer's time is that of the timed steps.

    Args:
        measured: What was found.
        work: Of a step.
        rates: What the device can do.
        ranks: Ranks that share the work.
        optimizer_ms: Of the timed steps.
    """
    rows = []
    for kind, spent in measured.layers.kinds.items():
        if GROUPS.get(kind) == "optimizer":
            continue
        rows.append(_row(kind, spent.forward_ms, spent.backward_ms, work.get(kind), rates, ranks))
    rows.append(_row(OPTIMIZER, optimizer_ms, 0.0, work[OPTIMIZER], rates, ranks))
    return sorted(rows, key=lambda row: (-row["ms"], row["kind"]))


def _row(
    kind: str, forward: float, backward: float, work: Work | None, rates: Rates, ranks: int
) -> dict[str, Any]:
    floor = None if work is None else work.floor_ms(rates.flops_per_s, rates.bytes_per_s) / ranks
    return {
        "kind": kind,
        "ms": round(forward + backward, 4),
        "forward_ms": round(forward, 4),
        "backward_ms": round(backward, 4),
        "floor_ms": _rounded(floor),
        "flops": None if work is None else work.flops,
        "bytes": None if work is None else work.bytes,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _share(flops: float, seconds: float, ranks: int, rate: float | None) -> float | None:
    return None if rate is None else round(flops / seconds / ranks / rate, 5)


def device_of(device: torch.device) -> dict[str, Any]:
    """Return what kind of device it is: name and compute capability, and both as a tag of file names."""
    if device.type != "cuda":
        return {"gpu_name": None, "gpu_cc": None, "hw_tag": "cpu", "threads": torch.get_num_threads()}
    name = torch.cuda.get_device_name(device)
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    tag = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return {"gpu_name": name, "gpu_cc": capability, "hw_tag": f"{tag}_sm{capability}", "threads": None}


def run_name(recipe: ProfileRecipe, layout: Layout) -> str:
    """Return the name of a run by its shape."""
    return (
        f"vpmoe_sl{recipe.seq_len}_mb{recipe.training.micro_batch_size}"
        f"_tp{layout.tp}_ep{layout.ep}_pp1_n{layout.world}"
    )


def enveloped(content: Mapping[str, Any], job: Job, recipe: ProfileRecipe) -> dict[str, Any]:
    """Return the report with what ties it to this run: commit, time, command and recipe.

    Args:
        content: The report.
        job: Its job.
        recipe: Of the job.
    """
    created = datetime.now(UTC)
    return {
        **content,
        "created_utc": created.isoformat(timespec="seconds"),
        "run_id": f"{content['run_name']}_{job.recipe_fingerprint[:8]}_{created:%Y%m%dT%H%M%SZ}",
        "run_tag": job.experiment,
        "run_dir": job.work_dir,
        "git_sha": job.provenance.git_sha,
        "git_dirty": job.provenance.git_dirty,
        "config_path": job.experiment,
        "config_sha256": config_hash(plain(recipe), job.seed),
        "tokenizer_path": None,  # mock data: ids are drawn, nothing is read
        "tokenizer_sha256": None,
        "train_cmd": " ".join(["python -m trainer", *redact_command(sys.argv[1:])]),
        "recipe_fingerprint": job.recipe_fingerprint,
    }


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a report as canonical JSON."""
    replace_text(path, canonical_json(content, indent=1) + "\n")


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, median and the 95th percentile (the nearest rank)."""
    ranked = sorted(values)
    p95 = ranked[min(len(ranked), -(-95 * len(ranked) // 100)) - 1]
    return {"mean": statistics.mean(ranked), "p50": statistics.median(ranked), "p95": p95}


def sentence(content: Mapping[str, Any]) -> str:
    """Say a report in a line."""
    step, memory = content["ms_per_step"], content["reserved_mem_bytes"] or content["peak_mem_bytes"]
    where = content["gpu_name"] or "CPU (figures of a CPU: they say nothing about a GPU)"
    used = "" if content["mfu"] is None else f", {content['mfu']:.1%} of its FLOP/s"
    return (
        f"{content['run_name']}, {content['transformer_impl']} {content['dtype']} on {where}: "
        f"{step['p50']:.1f} ms a step (95 %: {step['p95']:.1f}), {content['tokens_per_s']:,.0f} tokens/s"
        f"{used}, {memory / 2**30:.2f} GiB"
    )
