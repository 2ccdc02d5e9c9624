"""How weights are trained: backend, batch, optimizer, schedule, loss, and one complete recipe per run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.fusions import asked_fusions, require_fusions
from trainer.contract.schema.architecture import Architecture, MoeConfig
from trainer.contract.schema.base import (
    Count,
    Fraction,
    Frozen,
    Neutral,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from trainer.contract.schema.distillation import (
    DRAWN_TARGETS,
    KDConfig,
    Rollouts,
    ScoredData,
    check_rounds,
)
from trainer.contract.schema.words import BackendName, ObjectiveName

Momentum = Annotated[float, Field(ge=0, lt=1)]
Triples = Annotated[
    tuple[Annotated[tuple[float, float, float], Field(strict=False)], ...], Field(strict=False, min_length=1)
]

BUILT_IN_SAFETY_FACTOR = 2e-2
"""The built-in Polar Express coefficients were computed for this safety factor."""


class OptimizerConfig(Frozen):
    """NorMuon for matrices, AdamW for the rest; learning rates are peaks of one schedule.

    Attributes:
        name: `normuon`, or `adam` / `sgd` for every parameter.
        lr: Peak rate of the matrices (and of everything whose own rate is not set).
        normuon_aux_lr: Peak rate of the AdamW groups.
        decoupled_lr: Peak rate of embedding and output head.
        weight_decay: Decoupled decay of the matrices.
        embedding_weight_decay: Decoupled decay of embedding and head; 0 because most rows of a 201088-row
            vocabulary are rarely seen and would only shrink.
        polar_express_coefficients: (a, b, c) for each iteration; required with another safety
            factor than the built-in one.
    """

    name: Literal["normuon", "adam", "sgd"]
    lr: PositiveFloat
    normuon_momentum: Momentum = 0.95
    normuon_beta2: Momentum = 0.95
    normuon_eps: PositiveFloat = 1e-10
    normuon_aux_lr: PositiveFloat | None = None
    decoupled_lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.1
    embedding_weight_decay: NonNegativeFloat = 0.0
    polar_express_safety_factor: NonNegativeFloat = BUILT_IN_SAFETY_FACTOR
    polar_express_coefficients: Triples | None = None
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    adam_eps: PositiveFloat = 1e-8
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        off = abs(self.polar_express_safety_factor - BUILT_IN_SAFETY_FACTOR) > 1e-12
        if off and self.polar_express_coefficients is None:
            raise ValueError(
                f"polar_express_safety_factor = {self.polar_express_safety_factor} needs "
                f"polar_express_coefficients for it; the built-in table is for {BUILT_IN_SAFETY_FACTOR}"
            )
        return self


class ScheduleConfig(Frozen):
    """Learning-rate shape of all groups: linear warm-up, then `kind` down to `min_lr_fraction`.

    Layers that rest for the first steps of a run warm up a second time when they thaw, as long as a run of
    the steps that are left would.

    Attributes:
        warmup_fraction: Warm-up as a fraction of the run's steps.
        min_warmup_steps: Warm-up is at least this long; 20 steps are the time constant of averages that decay
            by 0.95 (NorMuon's momentum, and both second moments).
        min_warmup_limit: Share of the run above which `min_warmup_steps` does not lift the warm-up: a run of
            a few steps is not to spend itself warming up.
    """

    kind: Literal["cosine", "linear", "constant"]
    warmup_fraction: Fraction
    min_warmup_steps: Count = 20
    min_warmup_limit: Fraction = 0.25
    min_lr_fraction: Fraction


class TrainingConfig(Frozen):
    """Defaults of every stage and healing run; a run's own `training` table overrides them key by key.

    Attributes:
        global_batch_size: Sequences per optimizer step.
        micro_batch_size: Sequences per forward pass of one data-parallel rank.
        keep_last: Resume checkpoints to keep.
        keep_every: Also keep every checkpoint whose step is a multiple of this; 0 keeps none.
    """

    backend: BackendName
    dtype: Literal["fp32", "bf16"]
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    clip_grad: NonNegativeFloat
    save_interval: PositiveInt
    keep_last: PositiveInt
    keep_every: Count = 0
    log_interval: PositiveInt
    eval_interval: PositiveInt
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        return self


class TrainRecipe(Frozen):
    """One training run, complete: nothing that can change its weights is decided anywhere else.

    Attributes:
        seq_len: Tokens per packed sample.
        pack_block: Documents packed together, see `data.synth_kd_v1.pack`.
        harmony_fraction: Share of conversation samples; the rest is plain healing text.
        new_layers_only_steps: First steps, counted in `steps`, that train only the new layers; the
            schedule spans both phases.
        new_layers: 1-based numbers of those layers, the ones that a depth step inserted.
        init: Start from the seed, or from the checkpoint among the job's inputs.
        objective: What is minimised: name of a module of `trainer.losses`, which refuses keys that it would
            not use.
        kd: Weights of the spans of conversations; None makes all their supervised tokens one pool.
        scored: Mixes scored conversations with plain ones.
        rollouts: Mixes the student's own answers with stored conversations.
    """

    architecture: Architecture
    training: TrainingConfig
    steps: PositiveInt
    seq_len: PositiveInt
    pack_block: PositiveInt
    objective: ObjectiveName = "span_ce"
    kd: KDConfig | None = None
    scored: ScoredData | None = None
    rollouts: Rollouts | None = None
    init: Literal["fresh", "checkpoint"]
    harmony_fraction: Annotated[Fraction, Neutral()] = 1.0
    new_layers_only_steps: Annotated[Count, Neutral()] = 0
    new_layers: Annotated[tuple[PositiveInt, ...], Field(strict=False), Neutral()] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        longest = self.architecture.attention.max_sequence_length
        if self.seq_len > longest:
            raise ValueError(
                f"seq_len = {self.seq_len} is more than attention.max_sequence_length = {longest}"
            )
        if self.new_layers_only_steps > self.steps:
            raise ValueError(
                f"new_layers_only_steps = {self.new_layers_only_steps} is more than steps = {self.steps}"
            )
        self._check_new_layers()
        self._check_distillation()
        check_fusions(self.architecture.moe, self.training)
        return self

    def _check_distillation(self) -> None:
        asked = [key for key in ("scored", "rollouts") if getattr(self, key) is not None]
        if len(asked) > 1 or (asked and self.harmony_fraction != 1.0):
            raise ValueError(
                f"{' and '.join(asked)} with harmony_fraction = {self.harmony_fraction}: a run mixes two "
                "kinds of samples at most; give one of the tables, and leave harmony_fraction at 1"
            )
        if self.kd is not None:
            self._check_kd(self.kd)
        if self.rollouts is not None:
            check_rounds(self.rollouts, self.training.global_batch_size)
            if self.rollouts.max_new_tokens >= self.seq_len:
                raise ValueError(
                    f"rollouts.max_new_tokens = {self.rollouts.max_new_tokens} leaves no room for a prompt "
                    f"in seq_len = {self.seq_len}; lower it"
                )

    def _check_kd(self, kd: KDConfig) -> None:
        given = [f"kd.{key}" for key in ("kl_weight", "target", "rescored") if getattr(kd, key) is not None]
        if given and self.scored is None:
            raise ValueError(
                f"{', '.join(given)}: for scored conversations, and the run mixes none in; leave it out, or "
                "give the table scored"
            )
        if kd.target in DRAWN_TARGETS and self.scored is not None and not self.scored.tail_draws:
            raise ValueError(
                f"kd.target = {kd.target!r} needs scored.tail_draws > 0, found 0; take a store with draws, "
                "or target = 'bucket'"
            )

    def _check_new_layers(self) -> None:
        given, layers = list(self.new_layers), self.architecture.model.num_layers
        if self.new_layers_only_steps and self.architecture.moe is not None:
            raise ValueError(
                f"new_layers_only_steps = {self.new_layers_only_steps}: in a model with experts no layer can "
                "rest, because the balancing of its router would go on; set it to 0"
            )
        if bool(given) != bool(self.new_layers_only_steps):
            raise ValueError(
                f"new_layers_only_steps = {self.new_layers_only_steps}, but new_layers = {given}: a phase "
                "that trains only new layers needs to know them, and nothing else does"
            )
        if given != sorted(set(given)) or (given and given[-1] > layers):
            raise ValueError(
                f"new_layers = {given}: give increasing layer numbers from 1 to num_layers = {layers}"
            )


def check_fusions(moe: MoeConfig | None, training: TrainingConfig) -> None:
    """Refuse a fusion that the chosen backend lacks; it is never switched off silently.

    Raises:
        ValueError: Naming the key, its value, the backend and both remedies.
    """
    require_fusions(training.backend, asked_fusions(moe))
