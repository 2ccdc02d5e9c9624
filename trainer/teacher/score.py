"""The `score` command: a teacher's distributions at the supervised tokens of a data set's subset."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.job import Job
from trainer.contract.schema.score import ScoreRecipe
from trainer.contract.status import PAYLOAD_NAME, SUMMARY_NAME
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.manifest import SPLITS, write_manifest
from trainer.errors import TeacherError
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.distributed import session
from trainer.job.lifecycle import Interrupted
from trainer.job.metrics import MetricsLog
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir
from trainer.teacher.descriptor import DESCRIPTOR_NAME, read_descriptor
from trainer.teacher.modes import ModeWriter
from trainer.teacher.opening import open_teacher, teacher_identity
from trainer.teacher.scope import Conversation, Place, Scope
from trainer.teacher.second_asking import ask_again
from trainer.teacher.self_test import LEAST_TOKENS, require_tokenizer, self_test
from trainer.teacher.shards import (
    SPANS,
    Finished,
    Tally,
    Terms,
    held,
    questions,
    read_finished,
    score_shard,
    shard_path,
    tally_shard,
    write_finished,
)
from trainer.teacher.teacher import Teacher, TeacherScores

DATA_INPUT, TEACHER_INPUT, TOKENIZER_INPUT = "synth_kd_v1", "teacher", "o200k_tokenizer"
SHARDS_NAME = "shards"
_TESTED = 4  # conversations of the self-test, more where those are short


@dataclass(frozen=True)
class Share:
    """The part of the shards that this process makes.

    Attributes:
        number: Shards whose place in the list is this, modulo `of`.
        of: Processes.
    """

    number: int
    of: int


def score(
    job: Job,
    work: WorkDir,
    stop: StopRequest,
    *,
    share: Share | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Make a store's shards, and with all of them made, deliver it.

    Args:
        job: A `score` job.
        work: Where this process says how it is.
        stop: Asks for a clean stop.
        share: Make these shards and deliver nothing; by default make what is missing and deliver.
        batch_tokens: Most positions of a batch of a local teacher.

    Raises:
        Interrupted: Stopped as asked; finished work is kept.
        ConfigError: The job lacks an input.
        TeacherError, StoreError, DataError: See there.
    """
    recipe = job.score_recipe()
    execution = job.execution
    with session(execution.device, tp=execution.tp, ep=execution.ep, dp=execution.dp) as layout:
        Run(job, recipe, work, stop, layout.device, batch_tokens).complete(share)


class Run:
    """One process of a `score` job."""

    def __init__(
        self,
        job: Job,
        recipe: ScoreRecipe,
        work: WorkDir,
        stop: StopRequest,
        device: torch.device,
        batch_tokens: int | None,
    ) -> None:
        self.job, self.recipe, self.work, self.stop, self.device = job, recipe, work, stop, device
        self.batch_tokens = batch_tokens
        self.began = time.perf_counter()
        self.work.at("open the data", 0)
        self.scope = Scope(Path(job.inputs[DATA_INPUT].path), recipe.subset_fraction)
        self.shards = Path(job.work_dir) / SHARDS_NAME
        self.scored_tokens = 0
        self.seconds = 0.0
        self.log: MetricsLog | None = None
        self.ends = ExitStack()

    def complete(self, share: Share | None) -> None:
        """Make the shards of a share; without one, what is missing, and deliver."""
        if share is None and self.delivered():
            return
        terms = self.terms()
        places = self.scope.places if share is None else self.scope.places[share.number :: share.of]
        with self.ends:
            finished = self.make(places, terms)
        if share is None:
            self.deliver(finished, terms)

    def delivered(self) -> bool:
        """Whether an earlier process delivered this very store.

        Raises:
            ConfigError: The output directory holds another one.
        """
        path = Path(self.job.output_dir) / SUMMARY_NAME
        if not path.is_file():
            return False
        found = json.loads(path.read_text(encoding="utf-8")).get("recipe_fingerprint")
        if found != self.job.recipe_fingerprint:
            raise ConfigError(
                f"output_dir = {self.job.output_dir} holds another store (recipe_fingerprint {found}); give "
                "another directory, or remove what is there"
            )
        LOGGER.info("%s is delivered already", self.job.output_dir)
        return True

    def open(self) -> Teacher:
        """Open the teacher, and refuse one that these data are not for."""
        self.work.at("open the teacher", 0)
        teacher = self.ends.enter_context(
            open_teacher(
                Path(self.job.inputs[TEACHER_INPUT].path),
                digest=self.job.inputs[TEACHER_INPUT].digest,
                device=self.device,
                dtype=self.recipe.dtype,
                backend=self.recipe.backend,
                batch_tokens=self.batch_tokens,
                url_env=self.job.execution.teacher_url_env,
            )
        )
        require_tokenizer(teacher, self.scope.tokenizer_sha256, self.scope.vocab_size)
        if teacher.context is not None and self.scope.longest > teacher.context:
            raise TeacherError(
                f"the data set has a conversation of {self.scope.longest} tokens, the teacher reads "
                f"{teacher.context}: build the data with data.synth_kd_v1.seq_len = {teacher.context}, or "
                "take a teacher that reads more"
            )
        return teacher

    def terms(self) -> Terms:
        """Return how conversations are scored.

        Raises:
            ConfigError: The stored conversations, or the description of a served teacher, say another mode.
        """
        recipe, teacher = self.recipe, Path(self.job.inputs[TEACHER_INPUT].path)
        if (teacher / DESCRIPTOR_NAME).is_file():
            described = read_descriptor(teacher / DESCRIPTOR_NAME).reasoning_mode
            if described != recipe.reasoning_mode:
                raise ConfigError(
                    f"recipe.reasoning_mode = {recipe.reasoning_mode!r}, but {DESCRIPTOR_NAME} of the "
                    f"teacher says {described!r}; make it again, or set sources.teacher.reasoning_mode"
                )
        modes = None
        if TOKENIZER_INPUT in self.job.inputs:
            writer = ModeWriter(O200kTokenizer(Path(self.job.inputs[TOKENIZER_INPUT].path)))
            self.check_mode(writer)
            modes = writer if recipe.reasoning_mode != recipe.stored_mode else None
        identity = StoreIdentity(
            teacher=teacher_identity(
                teacher, digest=self.job.inputs[TEACHER_INPUT].digest, dtype=recipe.dtype
            )
            | {"reasoning_mode": recipe.reasoning_mode},
            tokenizer_sha256=self.scope.tokenizer_sha256,
            dataset_digest=self.job.inputs[DATA_INPUT].digest,
            subset_fraction=recipe.subset_fraction,
            vocabulary=self.scope.vocab_size,
            topk=recipe.topk,
            mass=recipe.mass,
            tail_draws=recipe.tail_draws,
            logprob_error=recipe.logprob_error,
        )
        return Terms(identity, self.job.seed, recipe.reasoning_mode, modes)

    def check_mode(self, writer: ModeWriter) -> None:
        """Refuse conversations that say another mode than the recipe says; the first one is looked at.

        Raises:
            ConfigError: It does.
        """
        first = next((one for place in self.scope.places for one in self.scope.conversations(place)), None)
        if first is not None and (found := writer.mode(first.tokens)) != self.recipe.stored_mode:
            raise ConfigError(
                f"recipe.stored_mode = {self.recipe.stored_mode!r}, but the stored conversations say "
                f"{found!r}; "
                "set it to that"
            )

    def make(self, places: Sequence[Place], terms: Terms) -> dict[Place, Finished]:
        """Make shards, those that an earlier process finished excepted; with none left, nobody is asked."""
        finished: dict[Place, Finished] = {}
        teacher: Teacher | None = None
        tested: dict[str, Any] = {}
        pieces = 0
        for place in places:
            known = read_finished(self.shards, place, terms.identity)
            if known is None:
                with held(self.shards, place):
                    if teacher is None:
                        teacher = self.open()
                        tested = self.test(places, teacher, terms)
                    known = self.one(place, teacher, terms, pieces, tested)
            finished[place] = known
            pieces += known.tally.pieces
        return finished

    def test(self, places: Sequence[Place], teacher: Teacher, terms: Terms) -> dict[str, Any]:
        """Test the teacher on the first conversations that it will score."""
        self.work.at("self-test of the teacher", 0)
        chosen: list[Conversation] = []
        for place in (*places, *self.scope.places):
            for conversation in self.scope.conversations(place):
                chosen.append(conversation)
                if len(chosen) >= _TESTED and sum(len(one.wanted) for one in chosen) >= LEAST_TOKENS:
                    break
            else:
                continue
            break
        sequences, wanted = questions(chosen, terms)
        found = self_test(teacher, sequences, wanted)
        LOGGER.info(
            "self-test: the same %d tokens again within %.2g nats, between replicas %.2g; they spread by "
            "%.3g",
            found.tokens,
            max(found.repeated, found.shuffled),
            found.replicas,
            found.signal,
        )
        return found.document()

    def one(
        self, place: Place, teacher: Teacher, terms: Terms, before: int, tested: dict[str, Any]
    ) -> Finished:
        """Make a shard."""
        began = time.perf_counter()
        since = began

        def done(number: int, piece: Sequence[Conversation], scores: Sequence[TeacherScores]) -> None:
            nonlocal since
            now = time.perf_counter()
            self.report(place, before + number + 1, piece, scores, now - since)
            bar.update(len(piece))
            since = now
            if self.stop:
                raise Interrupted(
                    f"stopped by {self.stop.received}; start the same job again to go on with {place}"
                )

        LOGGER.info("%s: scoring", place)
        self.work.at(f"{place}: scoring", before)
        with tqdm(desc=str(place), unit="conversation", disable=not sys.stderr.isatty(), leave=False) as bar:
            entry = score_shard(self.shards, self.scope, place, teacher, terms, done)
        self.work.at(f"{place}: reading back", before)
        tally = tally_shard(self.shards, self.scope, place, terms.identity, entry)
        self.work.at(f"{place}: asking again", before)
        ask_again(
            self.shards, self.scope, place, teacher, terms, int(entry["sequences"]), float(tested["signal"])
        )
        finished = Finished(entry, tally, round(time.perf_counter() - began, 3), tested)
        write_finished(self.shards, place, terms.identity, finished)
        LOGGER.info("%s: %d conversations, %d tokens", place, entry["sequences"], entry["tokens"])
        return finished

    def report(
        self,
        place: Place,
        step: int,
        piece: Sequence[Conversation],
        scores: Sequence[TeacherScores],
        seconds: float,
    ) -> None:
        """Log a piece."""
        if self.log is None:
            self.log = self.ends.enter_context(closing(MetricsLog(self.work.metrics, resume_step=step - 1)))
        tokens = sum(len(one) for one in scores)
        self.scored_tokens += tokens
        self.seconds += seconds
        values: dict[str, float | int | str] = {
            "shard": str(place),
            "conversations": len(piece),
            "tokens": tokens,
        }
        for number, name in SPANS.items():
            here = [
                one.label_logprob[conversation.spans == number]
                for conversation, one in zip(piece, scores, strict=True)
            ]
            if count := sum(map(len, here)):
                total = sum(float(part.sum(dtype="float64")) for part in here)
                values[f"{name}/label_logprob"] = total / count
        if tokens:
            values["tail_mass"] = sum(float(one.tail_mass.sum(dtype="float64")) for one in scores) / tokens
        values |= {"seconds": round(seconds, 3), "tokens_per_s": round(tokens / max(seconds, 1e-9), 1)}
        self.log.write(step, values)
        self.work.at(f"{place}: scoring", step)

    def deliver(self, finished: Mapping[Place, Finished], terms: Terms) -> None:
        """Write the payload whole, and the summary last."""
        self.work.at("deliver", sum(one.tally.pieces for one in finished.values()))
        tallies = {
            split: _sum([one.tally for place, one in finished.items() if place.split == split])
            for split in SPLITS
        }
        means = _means(tallies["train"])
        if len(means) < len(SPANS):
            missing = ", ".join(name for name in SPANS.values() if name not in means)
            raise TeacherError(
                f"no scored training token in the span {missing}: subset_fraction = "
                f"{self.recipe.subset_fraction} of {tallies['train'].of_conversations} conversations is too "
                "little; raise it"
            )
        output = Path(self.job.output_dir)
        writing, payload = output / WRITING_NAME, output / PAYLOAD_NAME
        for left in (writing, payload):
            shutil.rmtree(left, ignore_errors=True)
        for place in finished:
            source = shard_path(self.shards, place)
            target = writing / place.split / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
        write_manifest(
            writing,
            terms.identity,
            {
                split: [one.entry for place, one in finished.items() if place.split == split]
                for split in SPLITS
            },
            means,
        )
        writing.rename(payload)
        write_summary(output, self.summary(finished, tallies, terms))

    def summary(
        self, finished: Mapping[Place, Finished], tallies: Mapping[str, Tally], terms: Terms
    ) -> dict[str, Any]:
        """Return what is said of the store."""
        both = _sum(list(tallies.values()))
        tokens = sum(both.tokens.values())
        size = sum(one.entry["bytes"] for one in finished.values())
        seconds = math.fsum(one.seconds for one in finished.values())
        metrics: dict[str, float | int] = {
            f"{split}/{name}": value
            for split, tally in tallies.items()
            for name, value in (
                ("conversations", tally.conversations),
                ("tokens", sum(tally.tokens.values())),
                ("coverage", _share(sum(tally.tokens.values()), tally.of_tokens)),
            )
        }
        metrics |= {f"{name}/label_logprob": mean for name, mean in _means(both).items()}
        metrics |= {
            "tail_mass": _share(both.tail, tokens),
            "ids": _share(both.listed, tokens),
            "bytes_per_token": _share(size, tokens),
        }
        return {
            "command": self.job.command,
            "asset": self.job.asset,
            "experiment": self.job.experiment,
            "recipe_fingerprint": self.job.recipe_fingerprint,
            "teacher": dict(terms.identity.teacher),
            "metrics": metrics,
            "self_test": next(iter(finished.values())).self_test,
            "bytes": size,
            "shards": len(finished),
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "wall_seconds": round(time.perf_counter() - self.began, 3),
            "dtype": self.recipe.dtype,
            "execution": plain(self.job.execution),
            "gpus": [torch.cuda.get_device_name(self.device)] if self.device.type == "cuda" else [],
        }


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total = total.plus(tally)
    return total


def _means(tally: Tally) -> dict[str, float]:
    return {name: tally.logprob[name] / count for name, count in tally.tokens.items() if count}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _link(source: Path, target: Path) -> None:
    """Put a file in a second place without copying where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
