"""The speed of the student's training step: measured, and drawn."""

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.status import LOG_NAME
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import perf as checks
from vpmoe_assets.codebase.words import job_roots
from vpmoe_assets.lineage.record import PerfFigure


def perf_assets(experiment: Experiment) -> list[Produced]:
    """Return the `perf` group of an experiment."""
    return [_profile(experiment), _report(experiment)]


def _profile(experiment: Experiment) -> Produced:
    recipe = plain(experiment.profile_recipe())

    @produced_asset(
        experiment,
        group="perf",
        kinds={"pytorch"},
        recipe=recipe,
        roots=job_roots("profile", recipe),
        checks=[checks.device_events_present, checks.parts_add_up],
        metadata=_profile_metadata,
        seed=experiment.seed,
        trains=True,
    )
    def perf_profile(build: Build) -> Built:
        """Where the time and the memory of a training step of the student go.

        Steps of the first stage from random weights on mock conversations, timed by parts, by kinds of
        layers and by kernels, beside the least that the device could take. On a CPU the figures are a CPU's,
        and say so. Timings are no reproducible bytes: made again, the payload has another digest. What was
        measured on another device is reused like anything else; the device stands in the metadata.
        """
        from vpmoe_assets.speed import read_profile

        result = build.run_job("profile", {})
        content = read_profile(build.payload)
        step, parts = content["ms_per_step"], content["ms"]
        return Built(
            metrics={
                "device": content["gpu_name"] or "cpu",
                "ms_per_step": step["p50"],
                "tokens_per_s": content["tokens_per_s"],
                "mfu": content["mfu"],
                "optimizer_ms": parts["optimizer"],
                "optimizer_share": content["optimizer_share"],
                "peak_mem_bytes": content["peak_mem_bytes"],
                "reserved_mem_bytes": content["reserved_mem_bytes"],
                "gpu_ops_per_step": content["gpu_ops_per_step"],
            },
            details={name: content[name] for name in ("run_name", "hw_tag", "note", "data")},
            execution={**result.execution, "gpus": list(result.devices)},
            perf=tuple(figures(content)),
            attempts=result.attempts,
        )

    return perf_profile


def _report(experiment: Experiment) -> Produced:
    @produced_asset(
        experiment,
        group="perf",
        kinds={"markdown"},
        recipe={"plots": ["parts", "kinds"]},
        roots=["vpmoe_assets.speed"],
        checks=[checks.report_is_of_its_profile],
        metadata=_report_metadata,
    )
    def perf_report(build: Build, perf_profile: Published) -> Built:
        """The training step on one page: its parts, its kinds of layers, and how far they are from the least.

        `run/perf.html` is the page.
        """
        from vpmoe_assets.speed import images, page, read_profile, write_pages

        shutil.rmtree(build.payload)
        build.payload.mkdir()
        content = read_profile(perf_profile.payload)
        write_pages(content, build.payload)
        text = page(content, images(build.payload), f"{build.experiment.name}: a training step")
        (build.work.run / "perf.html").write_text(text, encoding="utf-8")
        floors = [row["floor_ms"] for row in content["layers"]["kinds"] if row["floor_ms"] is not None]
        return Built(metrics={"ms_per_step": content["ms_per_step"]["p50"], "floor_ms": sum(floors)})

    return perf_report


def _profile_metadata(item: Published) -> Mapping[str, Any]:
    from vpmoe_assets.speed import headline, read_profile

    content = read_profile(item.payload)
    shown: dict[str, Any] = {
        "measured": headline(content),
        "log": dg.MetadataValue.path(item.run / LOG_NAME),
        "kinds_of_layers": table(
            [
                {name: "" if row[name] is None else row[name] for name in ("kind", "ms", "floor_ms")}
                for row in content["layers"]["kinds"]
            ]
        ),
        "dearest": table(content["top_ops"]),
    }
    return shown


def _report_metadata(item: Published) -> Mapping[str, Any]:
    from vpmoe_assets.speed import images

    plots = "\n\n".join(f"![{name}]({source})" for name, source in images(item.payload).items())
    return {
        "page": dg.MetadataValue.path(item.directory / "run" / "perf.html"),
        "step": dg.MetadataValue.md((item.payload / "perf.md").read_text(encoding="utf-8")),
        "plots": dg.MetadataValue.md(plots),
    }


def figures(content: Mapping[str, Any]) -> Iterator[PerfFigure]:
    """Yield what the index keeps of a profile, each with its device and the shape of the run.

    Args:
        content: The report.
    """
    device = content["gpu_name"] or "cpu"
    shape = ("run_name", "transformer_impl", "dtype", "num_layers", "hw_tag", "data", "cuda_graphs")
    context = {name: content[name] for name in shape}
    step = content["ms_per_step"]
    plain: list[tuple[str, Any, str]] = [
        *((f"ms_per_step/{name}", value, "ms") for name, value in step.items()),
        *((f"ms/{name}", value, "ms") for name, value in content["ms"].items()),
        *((f"parts/{name}", value, "ms") for name, value in content["parts_ms"].items()),
        ("tokens_per_s", content["tokens_per_s"], "tokens/s"),
        ("tokens_per_s_per_gpu", content["tokens_per_s_per_gpu"], "tokens/s"),
        ("mfu", content["mfu"], "share"),
        ("mfu_of_measured_rate", content["mfu_of_measured_rate"], "share"),
        ("optimizer_share", content["optimizer_share"], "share"),
        ("peak_mem_bytes", content["peak_mem_bytes"], "bytes"),
        ("reserved_mem_bytes", content["reserved_mem_bytes"], "bytes"),
        ("gpu_ops_per_step", content["gpu_ops_per_step"], "operations"),
        ("gpu_busy_ms_per_step", content["gpu_busy_ms_per_step"], "ms"),
        ("set_up_s", content["set_up_s"], "s"),
    ]
    for row in content["layers"]["kinds"]:
        plain.append((f"kinds/{row['kind']}", row["ms"], "ms"))
        plain.append((f"floors/{row['kind']}", row["floor_ms"], "ms"))
    for name, value, unit in plain:
        if value is not None:
            yield PerfFigure(name=name, value=float(value), unit=unit, device=device, context=context)
