"""The `convert` command: one surgery step from its inputs to a delivered, re-read and measured checkpoint."""

import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoints.format import CONFIG_NAME, INDEX_NAME
from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.json_text import parse_json
from trainer.contract.schema.base import plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.rungs.rung import (
    ConversionRecipe,
    DonorRecipe,
    HuggingFaceRecipe,
    MegatronRecipe,
    RungRecipe,
)
from trainer.contract.status import PAYLOAD_NAME, SUMMARY_NAME
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.lifecycle import JobError
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir
from trainer.surgery.step import Conversion, Outcome, Step, Verdict
from trainer.surgery.steps import load_step
from trainer.surgery.tensorfile import WeightsError
from trainer.surgery.weights import WeightsReader, WeightsWriter

CLAIM = ".converting"
"""Says whose unfinished work an output directory holds; removed when the summary is there."""


def convert(job: Job, work: WorkDir, stop: StopRequest) -> None:
    """Convert as a job says and delivers.

    Nothing is in `output_dir/payload` before everything written was read back equal and measured, and
    `summary.json` comes last. A conversion that was cut short starts over.

    Args:
        job: A `convert` job.
        work: Its work directory.
        stop: Asks for a clean stop.

    Raises:
        Interrupted: Stopped as asked; nothing was delivered.
        JobError: The output directory holds something that is not this job's.
        ValueError: An input is not what the recipe says, or the result is not sound.
    """
    began = time.monotonic()
    recipe = job.convert_recipe()
    output = Path(job.output_dir)
    if _finished(output, job):
        LOGGER.info("%s: finished by an earlier start of this job; nothing to do", job.asset)
        return
    writing, scratch = output / WRITING_NAME, work.path / "scratch"
    _claim(output, job)
    for directory in (writing, scratch):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    inputs = {name: Path(given.path) for name, given in job.inputs.items()}
    conversion = Conversion(job, recipe, inputs, scratch, work, stop)
    try:
        outcome = _make(conversion, writing)
    except Exception:
        # Worthless, and it may be 12 GB.
        shutil.rmtree(writing, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        (output / CLAIM).unlink(missing_ok=True)
        raise
    work.at("deliver", 0)
    summary = _summary(conversion, outcome, writing, time.monotonic() - began)
    writing.rename(output / PAYLOAD_NAME)
    write_summary(output, summary)
    (output / CLAIM).unlink()
    shutil.rmtree(scratch)
    LOGGER.info(
        "%s: delivered in %.1f s, peak memory %.2f GB",
        job.asset,
        summary["wall_seconds"],
        summary["peak_rss_bytes"] / 1e9,
    )


def _make(conversion: Conversion, writing: Path) -> Outcome:
    """Fill `writing`, read it back and measure it."""
    with _process_group_of_its_own():
        step = load_step(conversion.recipe.step)
        LOGGER.info("%s: %s of %s", conversion.job.asset, conversion.recipe.step, conversion.source)
        outcome, written = _fill(step, conversion, writing)
        outcome.checks["reload"] = _reload(conversion, writing, written)
        step.check(conversion, writing, outcome)
    for name, verdict in outcome.checks.items():
        log = LOGGER.info if verdict.passed else LOGGER.warning
        log("check %s: %s. %s", name, "passed" if verdict.passed else "FAILED", verdict.description)
    conversion.check_stop()
    return outcome


def _finished(output: Path, job: Job) -> bool:
    """Whether an earlier start of this very job delivered; its summary is written last."""
    path = output / SUMMARY_NAME
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    keys = ("asset", "experiment", "recipe_fingerprint")
    theirs = {key: found.get(key) for key in keys} if isinstance(found, dict) else {}
    if theirs == {key: getattr(job, key) for key in keys} and _holds(output / PAYLOAD_NAME):
        return True
    raise JobError(
        f"{output} holds the finished output of another job ({theirs}); a conversion is never written over. "
        "Remove that directory, or give this job another output_dir"
    )


def _claim(output: Path, job: Job) -> None:
    """Take the output directory; what an interrupted start of this job left in it is cleared."""
    output.mkdir(parents=True, exist_ok=True)
    claim, payload = output / CLAIM, output / PAYLOAD_NAME
    ours = f"{job.experiment}/{job.asset} {job.recipe_fingerprint}\n"
    found = claim.read_text(encoding="utf-8") if claim.is_file() else None
    if found is None and _holds(payload):
        raise JobError(
            f"{payload} is not empty and no interrupted conversion left it; a conversion is never written "
            "over. Remove that directory, or give this job another output_dir"
        )
    if found not in (None, ours):
        raise JobError(
            f"{output} holds the interrupted conversion of another job ({(found or '').split(' ')[0]}). "
            "Run that job to its end, remove the directory, or give this job another output_dir"
        )
    replace_text(claim, ours)
    for left in (payload, output / WRITING_NAME):
        if _holds(left):
            LOGGER.warning("%s: removed what an interrupted conversion left", left)
        shutil.rmtree(left, ignore_errors=True)
    (output / SUMMARY_NAME).unlink(missing_ok=True)


def _holds(directory: Path) -> bool:
    """Whether there is anything in a directory; one that was made beforehand, empty, is as good as none."""
    return directory.is_dir() and any(directory.iterdir())


def _fill(step: Step, conversion: Conversion, writing: Path) -> tuple[Outcome, dict[str, str]]:
    """Run the step; returns its outcome and sha256 of each tensor that went through a writer."""
    recipe = conversion.recipe
    if not isinstance(recipe, MegatronRecipe):
        return step.convert(conversion, writing), {}
    with WeightsWriter(writing, recipe.architecture, recipe.dtype) as out:
        with conversion.phase("convert", len(out.specs)) as tick:
            out.on_write = tick
            outcome = step.convert(conversion, out)
        out.finish()
        return outcome, out.digests


def _reload(conversion: Conversion, writing: Path, written: Mapping[str, str]) -> Verdict:
    """Read every file back.

    Raises:
        WeightsError: What is on the disk is not what was written.
    """
    recipe = conversion.recipe
    with WeightsReader(writing) as reader:
        if isinstance(recipe, MegatronRecipe):
            reader.require_rung(recipe.architecture, recipe.dtype)
        with conversion.phase("read back", len(reader.names)) as tick:
            for name in reader.names:
                found = reader.digest(name)
                if (expected := written.get(name, found)) != found:
                    raise WeightsError(
                        f"{name}: sha256 {expected} was written, {found} read back from {writing}; the disk "
                        "or its driver is at fault. Nothing was delivered"
                    )
                tick(name)
        return Verdict(
            True,
            "every tensor was read back from its file and equals what was computed",
            {
                "tensors": len(reader.names),
                "bytes": sum(spec.nbytes for spec in reader.specs.values()),
                "files": len(reader.files),
            },
        )


@contextmanager
def _process_group_of_its_own() -> Iterator[None]:
    """Take down the single-process group that a model built in the block may have made."""
    before = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not before:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _summary(conversion: Conversion, outcome: Outcome, payload: Path, seconds: float) -> dict[str, Any]:
    job, recipe = conversion.job, conversion.recipe
    with WeightsReader(payload) as reader:
        parameters = reader.config.get("parameters")
        if parameters is None:
            parameters = sum(spec.elements for spec in reader.specs.values())
    checks = {
        name: {
            "passed": verdict.passed,
            "description": verdict.description,
            "metadata": dict(verdict.metadata),
        }
        for name, verdict in outcome.checks.items()
    }
    # Linux counts kilobytes, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    summary = {
        "command": job.command,
        "asset": job.asset,
        "experiment": job.experiment,
        "recipe_fingerprint": job.recipe_fingerprint,
        "step": recipe.step,
        "parameters": parameters,
        "payload": sorted(
            path.relative_to(payload).as_posix() for path in payload.rglob("*") if path.is_file()
        ),
        "checks": checks,
        "layers": outcome.layers,
        "transform": outcome.transform,
        "details": outcome.details,
        "provenance": _provenance(conversion, outcome),
        "device": job.execution.device,
        "peak_rss_bytes": peak,
        "wall_seconds": round(seconds, 3),
    }
    return {key: _json_value(value) for key, value in summary.items()}


def _json_value(value: Any) -> Any:
    """Return the value with None for NaN and infinity: JSON lacks them, and a failed check is read too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    return [_json_value(item) for item in value] if isinstance(value, list | tuple) else value


def _provenance(conversion: Conversion, outcome: Outcome) -> dict[str, Any]:
    """Return what a checkpoint's record says of its making, as far as the trainer knows it."""
    job, recipe = conversion.job, conversion.recipe
    inputs = [
        {
            "id": name,
            "digest": given.digest,
            "config_sha256": _sha256(Path(given.path) / CONFIG_NAME),
            "index_sha256": _sha256(Path(given.path) / INDEX_NAME),
            "record_sha256": _sha256(Path(given.path).parent / ".artifact.json"),
        }
        for name, given in sorted(job.inputs.items())
    ]
    source = next(given for given in inputs if given["id"] == recipe.source)
    return {
        "object_id": job.asset,
        "kind": recipe.step,
        "code": plain(job.provenance),
        "recipe_sha256": hashlib.sha256(canonical_json(plain(recipe)).encode()).hexdigest(),
        "inputs": inputs,
        "tokenizer": _tokenizer(conversion),
        "source": {
            "config_sha256": source["config_sha256"],
            "index_sha256": source["index_sha256"],
            **_source_numbers(recipe),
        },
        "student_spec": _student_spec(recipe),
        "seed": job.seed,
        "format": {"weights": "safetensors", "non_homogeneous_layers": True},
        "transform": outcome.transform,
        "checks": {name: verdict.passed for name, verdict in outcome.checks.items()},
        "parent_provenance_sha256": source["record_sha256"],
    }


def _source_numbers(recipe: ConversionRecipe) -> dict[str, float | None]:
    """Return the base of the rotation and the epsilon of the norms of what was converted."""
    if isinstance(recipe, RungRecipe):
        parent = recipe.parent
        return {"rope_theta": parent.grape.rotary_base, "rms_norm_eps": parent.model.norm_epsilon}
    assert isinstance(recipe, DonorRecipe)
    return {"rope_theta": recipe.donor.rope_theta, "rms_norm_eps": recipe.donor.rms_norm_eps}


def _student_spec(recipe: ConversionRecipe) -> dict[str, int]:
    if isinstance(recipe, HuggingFaceRecipe):
        donor = recipe.donor
        return {
            "num_layers": donor.num_layers,
            "hidden_size": donor.hidden_size,
            "num_attention_heads": donor.num_attention_heads,
            "num_key_value_heads": donor.num_key_value_heads,
            "head_dim": donor.head_dim,
            "vocab_size": recipe.vocab_size,
            "ffn_hidden_size": donor.intermediate_size,
        }
    assert isinstance(recipe, MegatronRecipe)
    model = recipe.architecture.model
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": recipe.architecture.vocab_size,
        "ffn_hidden_size": model.ffn_hidden_size,
    }


def _tokenizer(conversion: Conversion) -> dict[str, Any]:
    """Family, padded size, and digests of the vocabulary's files as far as an input tells them."""
    recipe = conversion.recipe
    vocabulary = recipe.vocabulary if isinstance(recipe, HuggingFaceRecipe) else recipe.source
    size = _student_spec(recipe)["vocab_size"]
    manifests = [
        json.loads(path.read_text(encoding="utf-8"))
        for directory in conversion.inputs.values()
        for path in (directory / "manifest.json", directory.parent / "manifest.json")
        if path.is_file()
    ]
    ranks = [manifest["tokenizer"].get("model_sha256") for manifest in manifests if "tokenizer" in manifest]
    return {
        "family": "o200k_harmony",
        "vocab_size_padded": size,
        "asset_sha256": ranks[0] if ranks else None,
        "tokenizer_json_sha256": _sha256(conversion.inputs[vocabulary] / "tokenizer.json"),
    }


def _sha256(path: Path) -> str | None:
    """sha256 of a file, None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
