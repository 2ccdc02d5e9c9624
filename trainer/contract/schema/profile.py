"""The recipe of a profile: the training run whose step is measured, and how many steps of it."""

from typing import ClassVar, Self

from pydantic import model_validator

from trainer.contract.schema.base import Frozen, PositiveInt, parse, plain
from trainer.contract.schema.training import TrainRecipe


class Profile(Frozen):
    """How the step of the student's first stage is measured.

    Attributes:
        warm_up_steps: Steps before any counts: kernels compile, graphs are captured, memory settles.
        steps: Steps that are timed, without any profiler.
        seq_len: Tokens of a sample; those of the stage by default, as the two below.
        micro_batch_size: Sequences of a forward pass.
        global_batch_size: Sequences of a step.
    """

    warm_up_steps: PositiveInt = 9
    steps: PositiveInt = 20
    seq_len: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    global_batch_size: PositiveInt | None = None

    def recipe(self, stage: TrainRecipe) -> "ProfileRecipe":
        """Return the complete recipe of a profile.

        Args:
            stage: The run whose step is measured.

        Raises:
            ConfigError: It cannot be run so.
        """
        run = plain(stage)
        for key in ("micro_batch_size", "global_batch_size"):
            if (asked := getattr(self, key)) is not None:
                run["training"][key] = asked
        run |= {
            "seq_len": self.seq_len or stage.seq_len,
            "steps": self.warm_up_steps + self.steps + ProfileRecipe.TRACED_STEPS,
            "init": "fresh",
            "warm_up_steps": self.warm_up_steps,
            "timed_steps": self.steps,
        }
        return parse(ProfileRecipe, run, origin="profile")


class ProfileRecipe(TrainRecipe):
    """One profile, complete. Its run starts from the seed and trains on mock conversations.

    Attributes:
        warm_up_steps: See `Profile`.
        timed_steps: Steps that are timed.
    """

    TRACED_STEPS: ClassVar[int] = 3
    """Steps after the timed ones, at most: a traced one, and without CUDA graphs another, warmed up."""
    SHORTEST: ClassVar[int] = 16
    """Tokens that a sample of mock conversations has at least."""
    warm_up_steps: PositiveInt
    timed_steps: PositiveInt

    @model_validator(mode="after")
    def _holds_a_conversation(self) -> Self:
        if self.seq_len < self.SHORTEST:
            raise ValueError(
                f"seq_len = {self.seq_len} holds no mock conversation; give {self.SHORTEST} or more"
            )
        return self
