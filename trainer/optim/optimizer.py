"""The mixed-precision optimizer: float32 gradients and master weights, sharded over ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainer.contract.schema.training import OptimizerConfig
from trainer.errors import NonFiniteGradientError, OptimizerError, OptimizerStateError
from trainer.job.marks import Mark, unmarked
from trainer.optim.device_step import CLIP_EPSILON, DeviceStep
from trainer.optim.elementwise import plan_elementwise, step_elementwise
from trainer.optim.exchange import WeightExchange
from trainer.optim.gradients import Gradients
from trainer.optim.low_halves import belongs
from trainer.optim.matrices import plan_matrices, step_matrices
from trainer.optim.parts import Ownership, Part, build_parts, tensor_parallel_dim
from trainer.optim.polar_express import coefficients_for, polar_express
from trainer.optim.routing import Route, Routed, route_model
from trainer.optim.sharded_state import SCHEMA, load_tensors, shard_state
from trainer.optim.topology import Topology


@dataclass(frozen=True)
class StepStats:
    """What one step did.

    Attributes:
        grad_norm: Global gradient norm before clipping.
        clip_scale: Factor the gradients were multiplied by, at most 1.
        learning_rates: Of `matrices`, `embeddings` and `vectors`, as far as the model has them; of those
            that train from the first step on, where some rest first.
    """

    grad_norm: float
    clip_scale: float
    learning_rates: dict[str, float]


@dataclass(frozen=True)
class _Launched:
    """A step under way: how its norm and factor are read, its fraction and its loss."""

    read: Callable[[], tuple[float, float]]
    lr_fraction: float
    loss: torch.Tensor | None


class Optimizer:
    """NorMuon for matrices and AdamW for the rest, over the process groups of Megatron's parallel state.

    Use: `zero_grad()`, any number of backward passes, `step(fraction)`, or `launch(fraction)` and `finish()`
    with other work between them, which the device need not wait for. Gradients are summed over ranks, so
    the loss must already be divided by counts of the whole global batch. Every data-parallel rank must start
    with the same weights. A parameter that requires a gradient must get one in every step; see
    `trainer.optim.gradients`.

    With `shard` each matrix (each expert of a stack) is updated by one data-parallel rank, which alone
    keeps its master weight and state, and hands the new weights to the others. Without it every rank updates
    everything.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: OptimizerConfig,
        *,
        clip_grad: float,
        shard: bool = True,
        kernels: bool = False,
        topology: Topology | None = None,
    ) -> None:
        """Route the model's parameters, plan ownership and allocate gradients and state.

        Args:
            model: Its parameters carry the attributes of `trainer.optim.routing`.
            config: Rates, decays and constants.
            clip_grad: Largest global gradient norm; 0 does not clip.
            shard: Spread state and work over data-parallel ranks.
            kernels: Update by kernels, and ask nothing of the device before all is launched: the same update
                but for rounding, in a fraction of the time. Of a bf16 weight's master weight they keep the
                low half alone, see `trainer.optim.low_halves`. Needs CUDA.
            topology: Process groups; by default those of Megatron's parallel state.

        Raises:
            OptimizerError: A parameter or setting is refused.
        """
        if not (math.isfinite(clip_grad) and clip_grad >= 0):
            raise OptimizerError(
                f"clip_grad = {clip_grad}: give the largest gradient norm, or 0 for no clipping."
            )
        self._config = config
        self._clip_grad = clip_grad
        self._topology = topology if topology is not None else Topology.current()
        self._kernels = kernels
        self._coefficients = coefficients_for(
            config.polar_express_safety_factor, config.polar_express_coefficients
        )
        self._orthogonalize = partial(
            polar_express,
            coefficients=self._coefficients,
            safety_factor=config.polar_express_safety_factor,
        )
        self.routed: list[Routed] = route_model(model.named_parameters(), config)
        for entry in self.routed:
            if not entry.param.is_contiguous():
                raise OptimizerError(f"{entry.name}: not contiguous; call .contiguous() where it is made.")
        self._ownership = Ownership(self.routed, self._topology)
        self.gradients = Gradients(self.routed, self._topology)
        self._shard = shard
        self._parts = build_parts(
            self.routed,
            self._ownership,
            self._topology,
            shard=shard,
            momentum_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.momentum_dtype],
            low_halves=kernels,
        )
        self._exchange = WeightExchange(self.routed, self._ownership, self._topology) if shard else None
        self._active: list[bool] | None = None
        self._device_step: DeviceStep | None = None
        self._launched: _Launched | None = None
        self._steps = 0
        self.mark: Mark = unmarked
        self._versions = self._current_versions()

    @property
    def steps(self) -> int:
        """Steps taken, over all resumes."""
        return self._steps

    def zero_grad(self) -> None:
        """Forget all gradients, and freeze or thaw what the step to come asks for.

        Call it before the first forward pass of a step.
        """
        self.gradients.zero()
        for entry in self.routed:
            if entry.route.frozen_steps:
                entry.param.requires_grad_(not self._frozen(entry.route))

    def _frozen(self, route: Route) -> bool:
        return self._steps < route.frozen_steps

    def step(self, lr_fraction: float, thaw_fraction: float = 1.0) -> StepStats:
        """Do a whole step: `launch` and `finish`."""
        self.launch(lr_fraction, thaw_fraction)
        return self.finish()

    @torch.no_grad()
    def launch(
        self, lr_fraction: float, thaw_fraction: float = 1.0, *, loss: torch.Tensor | None = None
    ) -> None:
        """Sum the gradients over ranks, clip them and update the weights. Collective.

        With kernels nothing is waited for: `finish` tells whether the step was a step.

        Args:
            lr_fraction: Fraction of every group's peak learning rate, from the schedule.
            thaw_fraction: Further factor on the rates of parameters that rested first: their own warm-up.
            loss: A number without dimensions, the same on every rank; where it is not finite nothing changes.

        Raises:
            NonFiniteGradientError: The gradient norm is NaN or infinite, on every rank; nothing has changed.
                With kernels it is `finish` that says so.
            MissingGradientError: A parameter that requires a gradient got none, on every rank; nothing has
                changed.
            OptimizerError: A fraction is not in [0, 1], `zero_grad()` or `finish()` was forgotten, or the
                weights were changed behind the optimizer's back.
        """
        for name, fraction in (("lr_fraction", lr_fraction), ("thaw_fraction", thaw_fraction)):
            if not 0 <= fraction <= 1:
                raise OptimizerError(f"{name} = {fraction}: must be in [0, 1].")
        if self._launched is not None:
            raise OptimizerError("launch() a second time: call finish() first, it tells how the step ended.")
        self._check_weights()
        self.mark("sum of gradients over ranks")
        self._plan(self.gradients.reduce())

        def rate(route: Route) -> float:
            return route.lr * lr_fraction * (thaw_fraction if route.frozen_steps else 1.0)

        if self._device_step is not None:
            self._device_step.mark = self.mark
            self._device_step.run(rate, steps=self._steps + 1, clip_grad=self._clip_grad, loss=loss)
            read = self._device_step.read
        else:
            found = self._update(rate, loss)
            read = lambda: found  # noqa: E731
        if self._exchange is not None:
            self.mark("exchange of weights")
            self._exchange.run()
        self._launched = _Launched(read, lr_fraction, loss)

    def finish(self) -> StepStats:
        """Wait for the step that was launched.

        Returns:
            Norm, clipping and rates of this step.

        Raises:
            NonFiniteGradientError: The gradient norm, or the loss that `launch` was given, is NaN or
                infinite, on every rank; nothing has changed.
            OptimizerError: No step was launched.
        """
        launched, self._launched = self._launched, None
        if launched is None:
            raise OptimizerError("finish() without a step under way: call launch() first.")
        norm, scale = launched.read()
        self._versions = self._current_versions()
        if launched.loss is not None and not math.isfinite(launched.loss.item()):
            raise NonFiniteGradientError(
                f"the loss is {launched.loss.item()} at optimizer step {self._steps + 1}. No weight has "
                "changed."
            )
        if not math.isfinite(norm):
            raise self._non_finite(norm)
        self._steps += 1
        return StepStats(
            grad_norm=norm,
            clip_scale=scale,
            learning_rates={entry.route.kind: entry.route.lr * launched.lr_fraction for entry in self.routed},
        )

    @torch.no_grad()
    def compile(self) -> None:
        """Compile the kernels of a step in which every parameter that now trains takes part.

        No state changes, and none is read that anyone writes in a forward or backward pass: another thread
        may do so meanwhile. Without kernels there is nothing to compile.
        """
        if self._kernels:
            self._plan([entry.param.requires_grad for entry in self.routed])
            if self._device_step is not None:
                with torch.cuda.device_of(self._device_step.gate):  # a new thread's device is the first one
                    self._device_step.compile()

    def _plan(self, active: list[bool]) -> None:
        """Plan the updates of the parameters that take part; anew only when layers freeze or thaw.

        Args:
            active: For each parameter, whether it takes part.
        """
        if active == self._active:
            return
        self._active = active
        self._stepping = [part for part in self._parts if active[part.index]]
        self._counted = [part for part in self._stepping if self._counts(part)]
        if self._kernels:
            self._device_step = DeviceStep(
                self._stepping,
                self._counted,
                self._config,
                self._coefficients,
                self._orthogonalize,
                self._topology,
                self.routed[0].param.device,
            )
            return
        matrices = [part for part in self._stepping if part.route.algorithm == "normuon"]
        others = [part for part in self._stepping if part.route.algorithm != "normuon"]
        self._matrix_batches = plan_matrices(matrices, self._topology.tensor)
        self._elementwise_chunks = plan_elementwise(others)

    def _update(self, rate: Callable[[Route], float], loss: torch.Tensor | None) -> tuple[float, float]:
        """Update part by part what the kernels do not; return the norm and the factor that clipped by it."""
        if loss is not None and not math.isfinite(loss.item()):
            return math.nan, 1.0
        self.mark("gradient norm")
        norm = self._norm()
        if not math.isfinite(norm):
            raise self._non_finite(norm)
        scale = min(1.0, self._clip_grad / (norm + CLIP_EPSILON)) if self._clip_grad else 1.0
        self.mark("clipping")
        if scale < 1 and self._stepping:
            torch._foreach_mul_([part.grad for part in self._stepping], scale)
        config = self._config
        self.mark("NorMuon, matrices")
        step_matrices(
            self._matrix_batches,
            rate=rate,
            mu=config.normuon_momentum,
            beta2=config.normuon_beta2,
            eps=config.normuon_eps,
            orthogonalize=self._orthogonalize,
            tensor_group=self._topology.tensor,
        )
        self.mark("AdamW")
        step_elementwise(self._elementwise_chunks, self._config, rate=rate, steps=self._steps + 1)
        self.mark("weights from masters")
        narrow = [part for part in self._stepping if part.keeps_master]
        if narrow:
            torch._foreach_copy_([part.weight for part in narrow], [part.master for part in narrow])
        return norm, scale

    def _norm(self) -> float:
        """Global gradient norm, every number of the whole model counted once."""
        device = self.routed[0].param.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if self._counted:
            grads = [part.grad for part in self._counted]
            total += torch.stack(torch._foreach_norm(grads)).double().square_().sum()
        self._topology.world.sum_(total)
        return math.sqrt(total.item()) if math.isfinite(total.item()) else total.item()

    def _counts(self, part: Part) -> bool:
        topology = self._topology
        if not self._shard:  # every rank of the group holds the same parts
            group = topology.expert_data if part.route.expert_parallel else topology.data
            if group.rank != 0:
                return False
        if part.route.expert_parallel or topology.tensor.rank == 0:
            return True
        entry = self.routed[part.index]
        return tensor_parallel_dim(entry.name, entry.param, topology) is not None

    def _non_finite(self, norm: float) -> NonFiniteGradientError:
        bad = [part.name for part in self._parts if not torch.isfinite(part.grad).all()]
        where = f"first of {len(bad)} here: {', '.join(bad[:3])}" if bad else "none of them is on this rank"
        return NonFiniteGradientError(
            f"gradient norm is {norm} at optimizer step {self._steps + 1}; non-finite gradients: {where}. "
            "No weight "
            f"has changed: look at the batch and the loss of this step, or resume from the last checkpoint."
        )

    # Weights have two copies in a bfloat16 model. Loading new ones into the model alone would be undone by
    # the next step, or leave them with the low halves of others; comparing version counters costs nothing and
    # finds it.

    def reload_master_weights(self) -> None:
        """Take the model's present weights as master weights, after loading others into the model."""
        with torch.no_grad():
            for part in self._parts:
                if part.low_half:
                    part.master.zero_()
                elif part.keeps_master:
                    part.master.copy_(part.weight)
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [entry.param._version for entry in self.routed]

    def _check_weights(self) -> None:
        versions = self._current_versions()
        for part in self._parts:
            if not part.keeps_master or versions[part.index] == self._versions[part.index]:
                continue
            if part.low_half or not belongs(part.weight, part.master):
                raise OptimizerError(
                    f"{part.name}: its weights were changed outside the optimizer and no longer belong to "
                    "the master "
                    f"weights. Call reload_master_weights() after loading weights without optimizer state."
                )

    def sharded_state_dict(self, model_sharded_state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state for `megatron.core.dist_checkpointing`, to save or to load into.

        Args:
            model_sharded_state_dict: The model's own, which says where each parameter lies in the whole
                model.

        Returns:
            A nested dictionary whose sharded tensors are the live state; global shapes and keys are the same
            For any number of data-parallel ranks.
        """
        return {
            "schema": SCHEMA,
            "algorithm": self._config.name,
            "step": self._steps,
            "tensors": shard_state(
                self._parts,
                self.routed,
                model_sharded_state_dict,
                self._topology,
                replicated=not self._shard,
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `dist_checkpointing.load` returned for `sharded_state_dict`.

        Load the model's weights first. A run that starts from converted weights without optimizer state does
        not call this.

        Args:
            state: The loaded dictionary.

        Raises:
            OptimizerStateError: The state is absent or of another optimizer, or does not fit the model.
        """
        if not state:
            raise OptimizerStateError(
                "the checkpoint holds no optimizer state: resuming needs it. To start afresh from its "
                "weights, "
                "make it the input of a new run (finetune) instead of resuming."
            )
        found = (state.get("schema"), state.get("algorithm"))
        if found != (SCHEMA, self._config.name):
            raise OptimizerStateError(
                f"optimizer state is {found}, this run needs {(SCHEMA, self._config.name)}; "
                f"resume with the configuration that made the checkpoint."
            )
        step = state.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise OptimizerStateError(f"optimizer state: step is {step!r}, expected a count of steps.")
        with torch.no_grad():
            load_tensors(self._parts, state.get("tensors", {}))
        self._steps = step
        self._versions = self._current_versions()

    def close(self) -> None:
        """Free gradients, hooks, master weights and state, and thaw all.

        Another optimizer may take the model then; this one cannot be used again.
        """
        self.gradients.close()
        self._plan([False] * len(self.routed))  # the plan holds views of what is to be freed
        self._launched = None
        for part in self._parts:
            part.release()
        self._parts.clear()
        for entry in self.routed:
            if entry.route.frozen_steps:
                entry.param.requires_grad_(True)
