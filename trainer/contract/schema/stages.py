"""The `[stages]` tables: training runs of the student, and the store of a teacher's scores between them."""

from typing import Literal, Self

from pydantic import model_validator

from trainer.contract.assets import TEACHER_TOPK
from trainer.contract.schema.base import Frozen, NamedTables, PositiveInt
from trainer.contract.schema.distillation import (
    DRAWN_TARGETS,
    KDConfig,
    KDSpans,
    Rollouts,
    Share,
    TeacherTopk,
    check_rounds,
)
from trainer.contract.schema.sources import Sources
from trainer.contract.schema.training import TrainingConfig
from trainer.contract.schema.words import ObjectiveName


class _Stage(Frozen):
    """A training stage of the student.

    Attributes:
        init: `fresh` starts from the experiment's seed instead of the parent's checkpoint.
        training: The experiment's `[training]`, overridden by the stage's own keys.
    """

    steps: PositiveInt
    init: Literal["fresh", "checkpoint"] = "checkpoint"
    training: TrainingConfig


class StageConfig(_Stage):
    """A stage on conversations as they are.

    Attributes:
        objective: What is minimised: name of a module of `trainer.losses`.
    """

    objective: ObjectiveName = "span_ce"
    kd: KDSpans = KDSpans()


class OfflineStage(_Stage):
    """A stage on conversations that a teacher has scored.

    Attributes:
        scored_fraction: Share of the samples that are scored conversations; the rest are those of stage 1.
    """

    objective: ObjectiveName = "topk_kl"
    kd: KDConfig = KDConfig()
    scored_fraction: Share

    def resolved_kd(self) -> KDConfig:
        """Return `kd` with the values that `topk_kl` has where the table leaves them out."""
        if self.objective != "topk_kl":
            return self.kd
        defaults = {"kl_weight": 0.5, "target": "bucket"}
        return self.kd.model_copy(
            update={key: value for key, value in defaults.items() if getattr(self.kd, key) is None}
        )


class OnPolicyStage(_Stage, Rollouts):
    """A stage on the student's own answers."""

    objective: ObjectiveName = "opd"
    kd: KDSpans = KDSpans()

    @model_validator(mode="after")
    def _check_rounds(self) -> Self:
        check_rounds(self, self.training.global_batch_size)
        return self

    def rollouts(self) -> Rollouts:
        """Return the keys of the rollouts, as a recipe has them."""
        return Rollouts(**{name: getattr(self, name) for name in Rollouts.model_fields})


class Stages(NamedTables):
    """The distillation stages, by asset name."""

    vpmoe_stage1: StageConfig
    teacher_topk: TeacherTopk | None = None
    vpmoe_stage2: OfflineStage | None = None
    vpmoe_stage3: OnPolicyStage | None = None

    def runs(self) -> tuple[str, ...]:
        """Names of the tables that are training runs."""
        return tuple(name for name in self.names() if name != TEACHER_TOPK)


def check_stages(stages: Stages, sources: Sources) -> None:
    """Refuse stages that lack what they are made from.

    Raises:
        ValueError: Naming the key, and the table or value that it needs.
    """
    teacher, store = sources.teacher, stages.teacher_topk
    if store is not None:
        if teacher is None:
            raise ValueError("stages.teacher_topk needs sources.teacher, whose scores it holds")
        if store.topk > sources.tokenizer.vocab_size:
            raise ValueError(
                f"stages.teacher_topk.topk = {store.topk} is more than the vocabulary of "
                f"{sources.tokenizer.vocab_size}"
            )
        if teacher.kind == "server" and store.tail_draws:
            raise ValueError(
                f"stages.teacher_topk.tail_draws = {store.tail_draws}, but sources.teacher.kind = 'server': "
                "draws need the whole distribution, which a server does not send; set tail_draws = 0, or "
                "take kind = 'hub'"
            )
    if stages.vpmoe_stage2 is not None:
        if store is None:
            raise ValueError("stages.vpmoe_stage2 needs stages.teacher_topk, the store that it learns from")
        target = stages.vpmoe_stage2.kd.target
        if target in DRAWN_TARGETS and not store.tail_draws:
            raise ValueError(
                f"stages.vpmoe_stage2.kd.target = {target!r} needs stages.teacher_topk.tail_draws > 0, found "
                "0; set it (8 is a good number), or take target = 'bucket'"
            )
    if stages.vpmoe_stage3 is not None:
        if stages.vpmoe_stage2 is None:
            raise ValueError("stages.vpmoe_stage3 needs stages.vpmoe_stage2, whose weights it starts from")
        if teacher is None:
            raise ValueError("stages.vpmoe_stage3 needs sources.teacher, which scores its rollouts")
