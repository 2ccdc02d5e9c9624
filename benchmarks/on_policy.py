"""Stage 3 learns: how much of its distance to the teacher a student loses, on what it writes itself.

    python -m benchmarks.on_policy [--device cuda] [--steps 240] [--student-steps 60] [--record]

In the setting of `benchmarks.learning`. A student that saw little of the language goes on under the engine,
the objective `opd` and `trainer.rollouts`: it answers prompts of the language, 26 tokens each, a teacher of
the product scores them beside it, one step behind. Measured before and after, and on the way: the whole
KL(student || teacher) in nats a token at the places of answers that the student samples to prompts that are
kept for this. `ce` is the comparator: as many steps more of cross-entropy on documents of the language. Three
seeds, side by side on a GPU; the gap closed is 1 - after / before.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.distillation import load_teacher, make_teacher
from benchmarks.learning import (
    BATCH,
    LENGTH,
    PROMPT,
    TEACHER,
    Documents,
    Language,
    compare,
    engine_for,
    log_probabilities,
    recipe_for,
)
from benchmarks.processes import run_apart
from benchmarks.record import record
from trainer.checkpoints.published import save_published
from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS
from trainer.contract.mix import mix_of
from trainer.contract.schema.distillation import CurriculumPhase, Rollouts
from trainer.contract.schema.training import TrainRecipe
from trainer.decoding.generation import generate
from trainer.decoding.sampling import Sampling
from trainer.job.distributed import Layout, session
from trainer.model.gpt import VPGPTModel, build_model
from trainer.rollouts.forms import SPAN_FINAL, SPAN_REASONING
from trainer.rollouts.history import History
from trainer.rollouts.prompts import Prompts, identity_of
from trainer.rollouts.scoring import Scorer
from trainer.rollouts.source import RolloutSource
from trainer.teacher.opening import open_teacher
from trainer.train.engine import Engine
from trainer.train.inputs import DataPart, TrainingData

ANSWER = 26
"""Tokens of an answer; three answers and their prompts fill a row."""
STUDENT = {"num_layers": 2, "hidden_size": 128, "head_dim": 32, "ffn_hidden_size": 512}
"""Wider than stage 2's: it is to have room for what the teacher knows."""
ROWS = 64
PROMPTS = 20_000
JUDGED = 512
"""Answers that the distance is measured on."""
ANCHOR = 0.125
ROLLOUTS_OF_A_STEP = 168


class PlainForm:
    """Answers without control tokens: the first half is reasoning, the second the answer."""

    stop = ()
    end = 0

    def spans(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the span of each sampled token."""
        return np.where(np.arange(len(ids)) < ANSWER // 2, SPAN_REASONING, SPAN_FINAL).astype(np.int64)

    def valid(self, ids: Sequence[int]) -> bool:
        """Whether an answer is as long as it has to be."""
        return len(ids) == ANSWER

    def control(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return nothing: there are no control tokens."""
        return np.zeros(len(ids), dtype=np.bool_)


def prompts_of(language: Language, seed: int) -> NDArray[np.int64]:
    """Draw prompts `[PROMPTS, PROMPT]`."""
    return language.documents(PROMPTS, seed, PROMPT)


def recipe_of(steps: int, learning_rate: float) -> TrainRecipe:
    """Return the recipe of on-policy training."""
    rollouts = Rollouts(
        anchor_fraction=ANCHOR,
        max_new_tokens=ANSWER,
        buffer_size=2 * ROLLOUTS_OF_A_STEP,
        max_staleness=2,
        delay=1,
        baseline=True,
        baseline_topk=64,
        curriculum=(CurriculumPhase(until=1.0, medium=1.0, high=0.0, rollouts=1),),
    )
    recipe = recipe_for(STUDENT, steps, learning_rate)
    batch = {"global_batch_size": ROWS, "micro_batch_size": ROWS}
    training = recipe.training.model_copy(update=batch)
    return recipe.model_copy(update={"objective": "opd", "rollouts": rollouts, "training": training})


def source_of(
    recipe: TrainRecipe, language: Language, teacher: Path, layout: Layout, seed: int
) -> RolloutSource:
    """Open the product's source of rollouts on prompts of the language."""
    asked = recipe.rollouts
    assert asked is not None
    drawn = prompts_of(language, 2000 + seed).astype(np.int32)
    scorer = Scorer(
        open_teacher(teacher, device=layout.device),
        topk=asked.baseline_topk,
        device=layout.device,
        threads=torch.get_num_threads(),
    )
    return RolloutSource(
        asked,
        prompts=Prompts(PROMPTS, lambda number, mode: drawn[number], identity_of("language", seed)),
        scorer=scorer,
        form=PlainForm(),
        history=History(None),
        layout=layout,
        seed=seed,
        steps=recipe.steps,
        seq_len=LENGTH,
        eod=0,
        rows=ROLLOUTS_OF_A_STEP,
    )


def reverse_kl(student: VPGPTModel, teacher: VPGPTModel, prompts: NDArray[np.int64]) -> float:
    """Return the mean KL(student || teacher) in nats a token, on answers that the student samples."""
    made = generate(
        student,
        prompts.tolist(),
        max_new_tokens=ANSWER,
        sampling=Sampling(temperature=1.0),
        seeds=range(len(prompts)),
        rows=len(prompts),
    )
    documents = torch.from_numpy(np.concatenate((prompts, [one.ids for one in made]), axis=1))
    student.eval()
    total = 0.0
    for part in documents.split(4 * BATCH):
        ours, theirs = (log_probabilities(model, part)[:, PROMPT - 1 :] for model in (student, teacher))
        total += (ours.exp() * (ours - theirs)).double().sum().item()
    student.train()
    return total / (len(prompts) * ANSWER)


def run_seed(seed: int, device: str, settings: dict[str, Any], folder: str) -> None:
    """Train a student of a seed both ways and write what they reach to `<folder>/<seed>.json`."""
    language, steps = Language(), settings["steps"]
    kept = language.documents(JUDGED, 6, PROMPT)
    held_out = language.documents(JUDGED, 5)
    with session(device) as layout:  # type: ignore[arg-type]
        teacher = load_teacher(Path(folder), layout.device)
        count = (settings["student_steps"] + steps) * BATCH
        documents = Documents(language.documents(count, 1000 + seed), CONVERSATIONS)
        first = engine_for(
            recipe_for(STUDENT, settings["student_steps"]), {CONVERSATIONS: documents}, layout, seed
        )
        for _ in range(settings["student_steps"]):
            first.step()
        first.close()
        weights = copy.deepcopy(first.model.state_dict())
        before = reverse_kl(first.model, teacher, kept)
        print(json.dumps({"seed": seed, "before": before}), flush=True)
        found: dict[str, Any] = {"before": before, "nll": compare(first.model, teacher, held_out)["nll"]}
        for arm in settings["arms"]:
            recipe = recipe_of(steps, settings["learning_rate"])
            if arm == "ce":
                recipe = recipe_for(STUDENT, steps, settings["learning_rate"])
            engine = _engine(recipe, language, documents, Path(folder) / "teacher", layout, seed)
            engine.model.load_state_dict(weights)
            engine.weights_changed()
            began, course, logged = time.perf_counter(), {}, {}
            for step in range(1, steps + 1):
                logged = dict(engine.step().metrics)
                if step % max(1, steps // 6) == 0 or step == steps:
                    course[step] = reverse_kl(engine.model, teacher, kept)
                    print(
                        json.dumps({"seed": seed, "arm": arm, "step": step, "kl": course[step]}), flush=True
                    )
            engine.close()
            measured = compare(engine.model, teacher, held_out)
            found[arm] = {
                "after": course[steps],
                "closed": 1 - course[steps] / before,
                "course": course,
                "nll": measured["nll"],
                "teacher_nll": measured["teacher_nll"],
                "seconds": time.perf_counter() - began,
                "logged": {name: value for name, value in logged.items() if "rollout" in name},
            }
    (Path(folder) / f"{seed}.json").write_text(json.dumps(found))


def _engine(
    recipe: TrainRecipe, language: Language, documents: Documents, teacher: Path, layout: Layout, seed: int
) -> Engine:
    if recipe.rollouts is None:
        return engine_for(recipe, {CONVERSATIONS: documents}, layout, seed)
    model = build_model(recipe.architecture, dtype=torch.float32, device=layout.device, seed=seed)
    share = mix_of(recipe).shares[CONVERSATIONS]
    data = TrainingData({CONVERSATIONS: DataPart(documents, documents, share, {})})
    live = {ROLLOUTS: source_of(recipe, language, teacher, layout, seed)}
    return Engine(model, recipe, data, layout, seed=seed, config_hash="", live=live)


def publish_teacher(device: str, folder: str) -> None:
    """Write the trained teacher as the product publishes weights, for `open_teacher`."""
    with session(device) as layout:  # type: ignore[arg-type]
        teacher = load_teacher(Path(folder), layout.device)
        save_published(teacher, recipe_for(TEACHER, 1).architecture, Path(folder) / "teacher")


def summary(found: dict[int, Any]) -> dict[str, Any]:
    """Return means over seeds with their standard errors."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return {"mean": statistics.mean(values), "se": error}

    return {
        "before": spread([one["before"] for one in found.values()]),
        "nll_before": spread([one["nll"] for one in found.values()]),
        "teacher_nll": next(iter(found.values()))["opd"]["teacher_nll"],
        "arms": {
            arm: {
                name: spread([one[arm][name] for one in found.values()])
                for name in ("after", "closed", "nll")
            }
            for arm in ("opd", "ce")
            if arm in next(iter(found.values()))
        },
        "closed_by_seed": {str(seed): one["opd"]["closed"] for seed, one in found.items()},
        "course": {str(seed): one["opd"]["course"] for seed, one in found.items()},
        "logged": {str(seed): one["opd"]["logged"] for seed, one in found.items()},
        "opd_seconds": max(one["opd"]["seconds"] for one in found.values()),
    }


def measure(
    device: str, seeds: Sequence[int], teacher_steps: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train the teacher, then all seeds side by side."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_apart(make_teacher, [(device, teacher_steps, folder)])
        run_apart(publish_teacher, [(device, folder)])
        teacher_seconds = time.perf_counter() - began
        calls = [(seed, device, settings, folder) for seed in seeds]
        run_apart(run_seed, calls, side_by_side=device == "cuda")
        found = {seed: json.loads((Path(folder) / f"{seed}.json").read_text()) for seed in seeds}
    return summary(found) | {
        "seeds": list(seeds),
        "settings": settings,
        "tokens_a_step": ROLLOUTS_OF_A_STEP * ANSWER,
        "teacher_steps": teacher_steps,
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
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--student-steps", type=int, default=60)
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--without-ce", action="store_true", help="leave the comparator out, and record nothing"
    )
    parser.add_argument("--record", action="store_true", help="append the result to results.jsonl")
    given = parser.parse_args()
    settings = {
        "steps": given.steps,
        "student_steps": given.student_steps,
        "learning_rate": given.learning_rate,
        "arms": ("opd",) if given.without_ce else ("opd", "ce"),
    }
    found = measure(given.device, given.seeds, given.teacher_steps, settings)
    print(json.dumps(found))
    if given.record and not given.without_ce:
        arms = found["arms"]
        record(
            f"distillation.stage3.reverse_kl.{given.device}",
            arms["opd"]["closed"]["mean"],
            "share of KL(student || teacher) closed on the student's own samples",
            comparator="as many steps of cross-entropy on documents of the language",
            ratio=arms["ce"]["after"]["mean"] / arms["opd"]["after"]["mean"],
            details=found,
        )


if __name__ == "__main__":
    main()
