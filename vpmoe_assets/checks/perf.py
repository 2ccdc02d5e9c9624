"""Checks of a profile of the training step."""

from collections.abc import Mapping

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import check
from vpmoe_assets.verdict import Verdict


@check("device_events_present")
def device_events_present(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """On a GPU the profiler saw its kernels; on a CPU the report says that its figures are a CPU's."""
    from vpmoe_assets.speed import read_profile

    content, asked = read_profile(item.payload), item.record.execution.get("device")
    found, note = content["device"], content["note"]
    faults = [] if found == asked else [f"the job was to run on {asked}, the report is of {found}"]
    if found == "cuda":
        if not content["gpu_ops_per_step"] or not content["gpu_busy_ms_per_step"]:
            faults.append("no kernel of the GPU is in the profile")
        if not content["gpu_name"]:
            faults.append("the report does not name the GPU")
    elif not note or "CPU" not in note or content["mfu"] is not None:
        faults.append("the report does not say that its figures are a CPU's")
    good = "figures of a CPU, and it says so"
    if found == "cuda":
        good = f"{content['gpu_ops_per_step']} operations of {content['gpu_name']} in a step"
    return Verdict.of(faults, good, {"device": found})


@check("parts_add_up", blocking=False)
def parts_add_up(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """The parts of a step add up to the step, and no kind of layer is faster than the GPU could be."""
    from vpmoe_assets.speed import read_profile

    content = read_profile(item.payload)
    whole, parts = content["ms_per_step"]["mean"], sum(content["parts_ms"].values())
    faults = []
    if abs(parts - whole) > 0.01 * whole:
        faults.append(f"the parts take {parts:.2f} ms, the step {whole:.2f} ms")
    faults += [
        f"{row['kind']} took {row['ms']:.3f} ms, and the device needs {row['floor_ms']:.3f} ms at the least"
        for row in content["layers"]["kinds"]
        # The rates of floors are measured too: they vary a little, and where other programs compete much.
        if content["device"] == "cuda" and row["floor_ms"] is not None and row["ms"] < 0.8 * row["floor_ms"]
    ]
    return Verdict.of(faults, f"parts of {parts:.2f} ms in a step of {whole:.2f} ms", {"step_ms": whole})


@check("report_is_of_its_profile")
def report_is_of_its_profile(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """The page tells the figures of the profile that it was drawn from, and its plots are whole images."""
    from vpmoe_assets.speed import PLOTS, headline, read_profile

    said = (item.payload / "perf.md").read_text(encoding="utf-8").splitlines()[0]
    faults = []
    if said != headline(read_profile(inputs["perf_profile"].payload)):
        faults.append(f"perf.md is of another profile: {said}")
    faults += [
        f"{name} is no whole PNG" for name in PLOTS if not _whole_png((item.payload / name).read_bytes())
    ]
    return Verdict.of(faults, said, {})


def _whole_png(content: bytes) -> bool:
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content[-8:-4] == b"IEND"
