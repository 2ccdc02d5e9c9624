"""Stage 2 learns: a lower held-out loss than cross-entropy at equal tokens; and what the tail is kept for.

    python -m benchmarks.distillation [--device cuda] [--steps 400] [--teacher-steps 3000] [--record]

In the setting of `benchmarks.learning`. Every arm trains the same student from the same weights on the same
documents in the same order, through the engine and the objective `topk_kl` with K = 16 ids and 8 draws, of
which a teacher scored 70 %; only the target differs.
The arm `ce` has kl_weight = 0, the others 0.5. The two negative controls are no part of the product:
`renormalised` scales the kept ids of both to 1, `tailless` leaves the tail's term away. Measured on held-out
documents: the loss in nats a token, and the whole KL(teacher || student). Three seeds; differences are paired
by seed, with the standard error of their mean. Seeds run side by side.

A published teacher of another tokenizer is offered to `trainer.teacher` too, and its refusal recorded.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning import (
    BATCH,
    STUDENT,
    TEACHER,
    VOCABULARY,
    Documents,
    Language,
    compare,
    engine_for,
    recipe_for,
    score,
    train_teacher,
)
from benchmarks.processes import run_apart
from benchmarks.record import record
from trainer.checkpoints.published import save_published
from trainer.contract.kinds import CONVERSATIONS, SCORED
from trainer.contract.schema.training import TrainRecipe
from trainer.errors import TeacherError
from trainer.job.distributed import session
from trainer.losses.common.spans import Batch
from trainer.losses.topk_kl import TokenRule, TopKDivergence
from trainer.model.gpt import VPGPTModel, build_model
from trainer.teacher.checkpoint import CheckpointTeacher
from trainer.teacher.self_test import require_tokenizer
from trainer.train.engine import Engine

TOPK, DRAWS = 16, 8
SCORED_FRACTION = 0.7
ARMS = ("ce", "bucket", "unbiased", "mix", "renormalised", "tailless")
CONTROLS = ("renormalised", "tailless")
HELD_OUT = 512
TOKENIZER = "0" * 64
"""Digest of the tokenizer that a language without text has."""


class _WrongRule(TokenRule):
    """A rule whose divergence loses the tail."""

    renormalise = False

    def divergence(
        self, bucket: Tensor, unbiased: Tensor | None, kept: Tensor, q: Tensor, student: Tensor
    ) -> Tensor:
        """Return the divergence over the kept ids alone."""
        if not self.renormalise:
            return kept
        mass = q.sum(dim=1, keepdim=True).clamp(min=1e-8)
        share = q / mass
        ours = student - torch.where(q > 0, student, -torch.inf).logsumexp(dim=1, keepdim=True)
        each = torch.where(q > 0, share * (share.clamp(min=1e-30).log() - ours), 0.0)
        return each.sum(dim=1)


class _Renormalised(_WrongRule):
    renormalise = True


class _WithoutTail(TopKDivergence):
    """The objective with one of these rules."""

    wrong: type[_WrongRule]

    def rule(self, batch: Batch, weights: Tensor) -> TokenRule | None:
        """Return the product's rule, with the other divergence."""
        rule = super().rule(batch, weights)
        if rule is not None:
            rule.__class__ = self.wrong
        return rule


def recipe_of(arm: str, steps: int) -> TrainRecipe:
    """Return the recipe of an arm."""
    target = arm if arm in ("unbiased", "mix") else "bucket"
    return recipe_for(
        STUDENT,
        steps,
        objective="topk_kl",
        kd={"kl_weight": 0.0 if arm == "ce" else 0.5, "target": target},
        scored={
            "fraction": SCORED_FRACTION,
            "subset_fraction": 1.0,
            "topk": TOPK,
            "tail_draws": DRAWS,
        },
    )


def use_arm(engine: Engine, arm: str) -> None:
    """Put the negative controls in place of the product's divergence."""
    if arm in CONTROLS:
        objective = engine.objective
        objective.__class__ = _WithoutTail
        assert isinstance(objective, _WithoutTail)
        objective.wrong = _Renormalised if arm == "renormalised" else _WrongRule


def run_seed(seed: int, device: str, steps: int, folder: str) -> None:
    """Train all arms of a seed and write what they reach to `<folder>/<seed>.json`."""
    language = Language()
    with session(device) as layout:  # type: ignore[arg-type]
        teacher = load_teacher(Path(folder), layout.device)
        scored = math.ceil(steps * BATCH * SCORED_FRACTION)
        documents = language.documents(steps * BATCH + 1, 1000 + seed)
        fields = score(teacher, documents[:scored], TOPK, DRAWS, seed)
        held_out = language.documents(HELD_OUT, 5)
        found: dict[str, Any] = {}
        for arm in ARMS:
            sources = {
                SCORED: Documents(documents[:scored], SCORED, fields),
                CONVERSATIONS: Documents(documents[scored:], CONVERSATIONS, fillers(fields)),
            }
            engine = engine_for(recipe_of(arm, steps), sources, layout, seed)
            use_arm(engine, arm)
            began = time.perf_counter()
            for _ in range(steps):
                last = engine.step()
            found[arm] = compare(engine.model, teacher, held_out) | {
                "train_loss": last.loss,
                "seconds": time.perf_counter() - began,
                "teacher_mass": last.metrics["teacher_mass/scored_final"],
            }
            engine.close()
            print(json.dumps({"seed": seed, "arm": arm} | found[arm]), flush=True)
    (Path(folder) / f"{seed}.json").write_text(json.dumps(found))


def publish(model: VPGPTModel, path: Path, device: torch.device) -> CheckpointTeacher:
    """Publish a teacher as every run publishes its weights, and open it as stage 2's scoring would."""
    sizes = {**TEACHER, "vocabulary": model.vocab_size}
    save_published(model, recipe_for(sizes, 1).architecture, path)
    return CheckpointTeacher(path, digest=TOKENIZER, device=device, dtype=torch.float32)


def refused_teacher(device: str, folder: Path) -> str:
    """Offer a teacher with the ids of another tokenizer; return what it is refused with."""
    with session(device) as layout:  # type: ignore[arg-type]
        recipe = recipe_for({**TEACHER, "vocabulary": VOCABULARY + 128}, 1)
        other = publish(
            build_model(recipe.architecture, device=layout.device), folder / "other", layout.device
        )
        try:
            require_tokenizer(other, TOKENIZER, VOCABULARY)
        except TeacherError as error:
            return str(error)
    raise SystemExit("a teacher of another tokenizer was accepted")


def fillers(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return fields for samples without scores, as they share a micro-batch with scored ones."""
    values = {"teacher_ids": -1, "teacher_draws": -1, "teacher_logprobs": -torch.inf}
    return {
        name: torch.full((1, *field.shape[1:]), values.get(name, 0), dtype=field.dtype).expand(
            field.shape[0], *field.shape[1:]
        )
        for name, field in fields.items()
    }


def make_teacher(device: str, steps: int, folder: str) -> None:
    """Train the teacher and write its weights."""
    with session(device) as layout:  # type: ignore[arg-type]
        torch.save(train_teacher(Language(), layout, steps).state_dict(), Path(folder) / "teacher.pt")


def load_teacher(folder: Path, device: torch.device) -> VPGPTModel:
    """Read the teacher back."""
    model = build_model(recipe_for(TEACHER, 1).architecture, device=device)
    model.load_state_dict(torch.load(folder / "teacher.pt", map_location=device))
    return model.eval()


def paired(found: dict[int, Any], measure: str, one: str, other: str) -> tuple[float, float]:
    """Return the mean difference `one - other` over seeds, and the standard error of that mean."""
    differences = [arms[one][measure] - arms[other][measure] for arms in found.values()]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def summary(found: dict[int, Any]) -> dict[str, Any]:
    """Return means over seeds with their standard errors, and the paired differences that are claimed."""
    seeds = list(found.values())

    def spread(arm: str, measure: str) -> dict[str, float]:
        values = [arms[arm][measure] for arms in seeds]
        return {"mean": statistics.mean(values), "se": statistics.stdev(values) / math.sqrt(len(values))}

    documents = Language().documents(HELD_OUT, 5)
    floor = -Language().log_probabilities(documents)[:, 14:].mean()
    return {
        "entropy_of_the_source": float(floor),
        "teacher_nll": seeds[0]["ce"]["teacher_nll"],
        "teacher_mass": statistics.mean(arms["bucket"]["teacher_mass"] for arms in seeds),
        "arms": {arm: {name: spread(arm, name) for name in ("nll", "forward_kl")} for arm in ARMS},
        "nll_below_ce": {arm: paired(found, "nll", "ce", arm) for arm in ARMS[1:4]},
        "kl_above_bucket": {arm: paired(found, "forward_kl", arm, "bucket") for arm in CONTROLS},
    }


def measure(device: str, seeds: Sequence[int], steps: int, teacher_steps: int) -> dict[str, Any]:
    """Train the teacher, then all seeds side by side."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_apart(make_teacher, [(device, teacher_steps, folder)])
        teacher_seconds = time.perf_counter() - began
        calls = [(seed, device, steps, folder) for seed in seeds]
        run_apart(run_seed, calls, side_by_side=device == "cuda")
        found = {seed: json.loads((Path(folder) / f"{seed}.json").read_text()) for seed in seeds}
        refused = refused_teacher(device, Path(folder))
    return summary(found) | {
        "teacher_of_another_tokenizer": refused,
        "seeds": list(seeds),
        "steps": steps,
        "tokens": steps * BATCH * 128,
        "teacher_steps": teacher_steps,
        "topk": TOPK,
        "teacher_seconds": teacher_seconds,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--record", action="store_true", help="append the results to results.jsonl")
    given = parser.parse_args()
    found = measure(given.device, given.seeds, given.steps, given.teacher_steps)
    print(json.dumps(found))
    if given.record:
        arms = found["arms"]
        record(
            f"distillation.stage2.nll.{given.device}",
            arms["bucket"]["nll"]["mean"],
            "nats/token held out",
            comparator="cross-entropy alone, equal tokens (ratio: distance to the source's entropy)",
            ratio=(arms["ce"]["nll"]["mean"] - found["entropy_of_the_source"])
            / (arms["bucket"]["nll"]["mean"] - found["entropy_of_the_source"]),
            details=found,
        )
        record(
            f"distillation.stage2.tail.{given.device}",
            arms["bucket"]["forward_kl"]["mean"],
            "nats/token, KL(teacher || student)",
            comparator="kept ids renormalised",
            ratio=arms["renormalised"]["forward_kl"]["mean"] / arms["bucket"]["forward_kl"]["mean"],
            details=found,
        )


if __name__ == "__main__":
    main()
