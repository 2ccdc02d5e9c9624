"""One training run's moving parts as one object: step, measure, save, resume."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.checkpoints.published import sharded_state_dict
from trainer.checkpoints.resume import LIVE_NAME, CheckpointError, Checkpoints, RunState
from trainer.contract.mix import mix_of
from trainer.contract.schema.base import plain
from trainer.contract.schema.training import TrainingConfig, TrainRecipe
from trainer.data.kd import Sample
from trainer.data.live import LiveSource
from trainer.data.mixture import MixtureSampler, Place
from trainer.data.sampler import collate
from trainer.errors import NonFiniteGradientError
from trainer.job.distributed import Layout, seed_everything, together
from trainer.job.lifecycle import JobError
from trainer.job.marks import Mark, unmarked
from trainer.job.metrics import Value
from trainer.losses.common.objective import load_objective
from trainer.model.gpt import VPGPTModel
from trainer.model.init import require_filled
from trainer.model.router_metrics import router_metrics
from trainer.optim.freezing import train_only_layers
from trainer.optim.optimizer import Optimizer
from trainer.optim.schedule import lr_fraction, thaw_fraction
from trainer.train.captured import Body, count_documents
from trainer.train.heldout import finite, measure_held_out
from trainer.train.inputs import PLACE_OF, TrainingData


class NonFiniteError(JobError):
    """The loss or the gradient of a step is NaN or infinite."""


@dataclass
class Progress:
    """What a run has seen so far, kept over restarts.

    Attributes:
        tokens: Positions that held a document's token (`total`), and supervised ones per span.
        absent_spans: Per span, steps whose global batch should have had tokens of it and had none.
        samples: Samples of each kind.
        loss_first, loss_last: Training objective of the first and the latest step.
        heldout: Every measurement of the held-out loss, with its step.
        router: Router health of the latest step; empty for a dense model.
        train_seconds: Time spent in steps.
        layouts: Every layout that steps were run under, of `Checkpoints.present_layout`, with `after`, the
            step after which it began.
    """

    tokens: dict[str, int]
    absent_spans: dict[str, int]
    samples: dict[str, int]
    loss_first: float | None = None
    loss_last: float | None = None
    heldout: list[dict[str, Any]] = field(default_factory=list)
    router: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    layouts: list[dict[str, Any]] = field(default_factory=list)

    def goes_on(self, step: int, layout: Mapping[str, Any]) -> None:
        """Note that the steps after `step` are run under a layout."""
        if not ran_under(self.describe(), step, layout):
            self.layouts.append({"after": step, **layout})

    def describe(self) -> dict[str, Any]:
        """As plain values, a copy."""
        return asdict(self)


def ran_under(progress: Mapping[str, Any], step: int, layout: Mapping[str, Any]) -> bool:
    """Whether all steps after `step` were run under a layout, and thus round as it does.

    The number of threads counts on a CPU alone.

    Args:
        progress: Of `Progress.describe`.
        step: Not after the last step.
        layout: Of `Checkpoints.present_layout`.
    """
    left_out = {"after"} if layout["device"] == "cpu" else {"after", "threads"}

    def rounding(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name not in left_out}

    last = progress["layouts"][-1] if progress["layouts"] else None
    return last is not None and last["after"] <= step and rounding(last) == rounding(layout)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        step: Its 1-based number.
        loss: The objective over the global batch, without the router's auxiliary loss.
        grad_norm: Global gradient norm before clipping.
        tokens_per_second: Document tokens over the whole world per second.
        metrics: Everything that is logged, by name.
    """

    step: int
    loss: float
    grad_norm: float
    tokens_per_second: float
    metrics: Mapping[str, Value]


class Engine:
    """Model, optimizer, data order and counters of a run.

    Collective throughout: every rank calls the same methods in the same order.

    Args:
        model: The model, on this rank's device.
        recipe: What to train.
        data: The open data.
        live: Sources of the kinds of samples that no data set holds; the engine's own, closed with it.
        layout: The parallel layout.
        seed: The experiment's seed.
        config_hash: Identity of recipe and seed, stored with checkpoints.
    """

    def __init__(
        self,
        model: VPGPTModel,
        recipe: TrainRecipe,
        data: TrainingData,
        layout: Layout,
        *,
        seed: int,
        config_hash: str,
        live: Mapping[str, LiveSource] | None = None,
    ) -> None:
        settings = recipe.training
        self.model, self.recipe, self.layout, self.seed = model, recipe, layout, seed
        self.config_hash = config_hash
        train_only_layers(model, recipe.new_layers, recipe.new_layers_only_steps)
        self.optimizer = Optimizer(
            model,
            settings.optimizer,
            clip_grad=settings.clip_grad,
            kernels=model.backend.optimizer_kernels,
        )
        mix = mix_of(recipe)
        self.live = dict(live or {})
        self.sources = {kind: self.live.get(kind) or data.parts[kind].train for kind in mix.kinds}
        self.objective = load_objective(recipe.objective).of(recipe, self.sources)
        if data.store is not None:
            self.objective.use_store(data.store)
        self.sampler = MixtureSampler(
            self.sources,
            mix,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp,
        )
        self.data = data
        micro_batches = settings.global_batch_size // (settings.micro_batch_size * layout.dp)
        self.body = Body(model, several=micro_batches > 1)
        self.iteration = 0
        self._mark: Mark = unmarked
        names = self.objective.names
        self.progress = Progress(
            tokens=dict.fromkeys(("total", *names), 0),
            absent_spans=dict.fromkeys(names, 0),
            samples=dict.fromkeys(self.sources, 0),
        )
        seed_everything(seed, layout.device)

    @staticmethod
    def dtype(settings: TrainingConfig) -> torch.dtype:
        """Type of weights and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]

    def marked_by(self, mark: Mark) -> None:
        """Tell somebody of each part of the steps to come, as it begins."""
        self._mark = self.optimizer.mark = mark

    def weights_changed(self) -> None:
        """Tell the optimizer that other weights were loaded into the model."""
        self.optimizer.reload_master_weights()

    def parameters(self) -> int:
        """Trainable numbers of the whole model, whatever part of it this rank holds."""
        names = {name for name, _ in self.model.named_parameters()}
        state = self.flat_tensors(optimizer=False)
        return sum(math.prod(t.global_shape) for t in state.values() if t.key in names)

    def close(self) -> None:
        """Take the optimizer off the model, so that both can be freed, and close the live sources."""
        self.body.release()
        self.optimizer.close()
        self.close_live()

    def close_live(self) -> None:
        """Close the live sources: a run that has failed must not go on asking a teacher."""
        for source in self.live.values():
            source.close()

    # ---------------------------------------------------------------- one step

    def step(self, *, per_layer_router_metrics: bool = False) -> StepResult:
        """One optimizer step over one global batch.

        Args:
            per_layer_router_metrics: Adds every layer's router health to the metrics.

        Raises:
            NonFiniteError: Loss or gradient is NaN or infinite, on every rank; no weight has changed.
            LossError: The batch has nothing to train on, or lacks a field.
        """
        began = time.perf_counter()
        settings, group = self.recipe.training, self.layout.dp_group
        for source in self.live.values():
            source.prepare(self.iteration + 1, self.model)
        self._mark("data")
        places = self.sampler.next_batch()
        share = self.sampler.share(places)
        collated = [self._collate(part) for part in share]
        documents = [count_documents(batch["doc_id"]) for batch in collated]
        batches = [self._to_device(batch) for batch in collated]
        samples = Counter(place.part for place in places)
        global_batch = self.objective.start(batches, samples, group)
        self.model.train()
        self._mark("clearing of gradients")
        self.optimizer.zero_grad()
        if self.body.prepare(*_inputs(batches[0]), documents[0], self.optimizer.compile):
            self.optimizer.zero_grad()
        self.model.reset_router_counts()
        losses: list[torch.Tensor] = []
        aux_sum = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for batch, runs in zip(batches, documents, strict=True):
            self._mark("forward")
            hidden, aux = self.body(*_inputs(batch), runs)
            self._mark("loss")
            loss = global_batch.loss(self.model, hidden, batch)
            aux = aux / (len(batches) * self.layout.dp)
            self._mark("backward")
            (loss + aux).backward()
            losses.append((loss + aux).detach())
            aux_sum += aux.detach()
        self._mark("statistics")
        document_tokens = torch.stack([(batch["doc_id"] >= 0).sum() for batch in batches]).sum()
        totals = torch.stack((aux_sum, torch.stack(losses).double().sum(), document_tokens.double()))
        dist.all_reduce(totals, group=group)
        aux_sum, loss_sum, document_tokens = totals
        schedule, resting = settings.schedule, self.recipe.new_layers_only_steps
        fraction = lr_fraction(self.iteration, self.recipe.steps, schedule)
        thawed = thaw_fraction(self.iteration, self.recipe.steps, resting, schedule)
        try:
            # Nobody looks at the loss before all is launched: what is not finite changes nothing by itself.
            self.optimizer.launch(fraction, thawed, loss=loss_sum)
            metrics: dict[str, Value] = dict(global_batch.metrics())
            objective = float(metrics["loss"] or 0.0)
            self._require_finite(objective + aux_sum.item(), share, losses)
            stats = self.optimizer.finish()
        except NonFiniteGradientError as error:
            raise NonFiniteError(f"step {self.iteration + 1} ({self._name(places)}): {error}") from error
        self.iteration += 1
        self._mark("router balance")
        router = self._balance_experts(per_layer_router_metrics)
        self._mark("statistics")
        seconds = time.perf_counter() - began
        total_tokens = int(document_tokens.item())
        self._count(metrics, samples, total_tokens, objective, router, seconds)
        rate = total_tokens / seconds
        metrics |= {f"lr/{kind}": lr for kind, lr in stats.learning_rates.items()}
        metrics |= {f"samples/{name}": samples[name] for name in self.sources}
        metrics |= {f"epoch/{name}": epoch for name, epoch in self.sampler.epochs.items()}
        if self.model.moe_layer_numbers and (coefficient := self.model.config.moe_aux_loss_coeff):
            # Without its coefficient, mean over MoE layers: 1 when the load is even.
            metrics["aux_loss"] = aux_sum.item() / (coefficient * len(self.model.moe_layer_numbers))
        if resting:
            metrics["new_layers_only"] = self.iteration <= resting
            metrics["lr/thaw_fraction"] = thawed
        metrics |= {
            "grad_norm": stats.grad_norm,
            "clip_scale": stats.clip_scale,
            "consumed_samples": self.iteration * settings.global_batch_size,
            "consumed_tokens": self.progress.tokens["total"],
            "tokens_per_second": rate,
            "step_ms": 1000 * seconds,
            **router,
        }
        for source in self.live.values():
            metrics |= source.metrics()
        return StepResult(self.iteration, objective, stats.grad_norm, rate, metrics)

    def _collate(self, places: Sequence[Place]) -> Sample:
        return collate([self.sources[place.part].sample(place.epoch, place.number) for place in places])

    def _to_device(self, samples: Sample) -> Sample:
        return {name: tensor.to(self.layout.device, non_blocking=True) for name, tensor in samples.items()}

    def _hidden(self, batch: Sample) -> torch.Tensor:
        """Return the final hidden states of a micro-batch, `[S, B, H]`."""
        return self.model.forward_hidden(*_inputs(batch))

    def _balance_experts(self, per_layer: bool) -> dict[str, float]:
        """Move the expert biases by the global batch's counts and report the routers' health."""
        if not self.model.moe_layer_numbers:
            return {}
        counts = self.model.router_counts()
        dist.all_reduce(counts, group=self.layout.dp_group)
        self.model.update_expert_bias(counts)
        biases = self.model.expert_biases()
        return router_metrics(
            counts.cpu(),
            None if biases is None else biases.cpu(),
            self.model.moe_layer_numbers,
            per_layer=per_layer,
        )

    def _count(
        self,
        metrics: Mapping[str, Value],
        samples: Mapping[str, int],
        total_tokens: int,
        objective: float,
        router: Mapping[str, float],
        seconds: float,
    ) -> None:
        progress = self.progress
        progress.tokens["total"] += total_tokens
        for name in self.sources:
            progress.samples[name] += samples.get(name, 0)
        for name in self.objective.names:
            progress.tokens[name] += int(metrics[f"tokens/{name}"] or 0)
        progress.absent_spans = dict(self.objective.absent)
        progress.loss_first = objective if progress.loss_first is None else progress.loss_first
        progress.loss_last = objective
        progress.router = {name: value for name, value in router.items() if "/layer_" not in name}
        progress.train_seconds = round(progress.train_seconds + seconds, 3)

    def _require_finite(
        self, value: float, share: Sequence[Sequence[Place]], losses: Sequence[torch.Tensor]
    ) -> None:
        """Stop on NaN or infinity and name the samples; every rank sees the same reduced value."""
        if math.isfinite(value):
            return
        mine = [
            tuple(place)
            for part, loss in zip(share, losses, strict=True)
            if not math.isfinite(loss.item())
            for place in part
        ]
        found: list[Any] = [None] * self.layout.world
        dist.all_gather_object(found, mine)
        guilty = sorted({Place(*place) for part in found for place in part})
        raise NonFiniteError(
            f"step {self.iteration + 1}: the loss is {value}, from {self._name(guilty)}. No weight has "
            "changed and the checkpoints before are intact: look at these samples, or lower the learning "
            "rate and start from an earlier checkpoint"
        )

    def _name(self, places: Sequence[Place]) -> str:
        names = [self.sources[place.part].describe(place.epoch, place.number) for place in places[:4]]
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        return "; ".join(names) + more

    # ---------------------------------------------------------------- measuring

    def held_out(self) -> dict[str, Value]:
        """Return the held-out losses now, see `trainer.train.heldout`; kept in the run's progress.

        Raises:
            NonFiniteError: One of them is NaN or infinite.
            ValueError: A validation split is too small, or has nothing supervised.
        """

        def token_measures(batch: Sample) -> dict[str, torch.Tensor]:
            return self.objective.token_measures(self.model, self._hidden(batch), batch)

        self.model.eval()
        result = measure_held_out(
            token_measures, self.data, self.objective, self.recipe.training, self.layout
        )
        self.model.train()
        if not finite(result):
            raise NonFiniteError(f"the held-out loss after step {self.iteration} is {result['heldout_loss']}")
        self.progress.heldout.append({"step": self.iteration, **result})
        return dict(result)

    # ---------------------------------------------------------------- saving

    def tensors(self) -> dict[str, Any]:
        """Model and optimizer as Megatron sharded tensors over the live storage, to save or to load into."""
        model = sharded_state_dict(self.model)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model)}

    def flat_tensors(self, *, optimizer: bool = True) -> dict[str, ShardedTensor]:
        """Return the same, flat."""
        state = self.tensors() if optimizer else sharded_state_dict(self.model)
        found = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
        return {f"{value.key}@{value.global_offset}": value for value in found}

    def run_state(self) -> RunState:
        """Everything else that a resume must find."""
        return RunState(
            iteration=self.iteration,
            config_hash=self.config_hash,
            samplers={PLACE_OF[kind]: state for kind, state in self.sampler.state_dict().items()},
            schedule={"steps": self.recipe.steps, **plain(self.recipe.training.schedule)},
            progress=self.progress.describe(),
        )

    def save(self, checkpoints: Checkpoints, provenance: Mapping[str, Any]) -> Any:
        """Write a resume checkpoint of the present step; returns its directory."""
        live = self._save_live if self.live else None
        return checkpoints.save(self.tensors(), self.run_state(), provenance, live=live)

    def _save_live(self, directory: Path) -> None:
        for kind, source in self.live.items():
            (directory / kind).mkdir(exist_ok=True)
            source.save(directory / kind)

    def resume(self, checkpoints: Checkpoints, iteration: int) -> None:
        """Go to a saved step.

        Raises:
            CheckpointError: It belongs to another run or is damaged.
            DataError: The data are packed in another order than the checkpoint's.
            OptimizerStateError: The optimizer state does not fit.
        """
        state = checkpoints.read_matching(iteration, self.run_state())
        places = {kind: state.samplers[PLACE_OF[kind]] for kind in self.sources}
        self.sampler.load_state_dict(places, steps=iteration)
        for kind, source in self.live.items():
            source.load(checkpoints.path(iteration) / LIVE_NAME / kind)
        loaded = checkpoints.load(iteration, self.tensors(), seed=self.seed)
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        if self.optimizer.steps != iteration:
            raise CheckpointError(
                f"{checkpoints.path(iteration)}: the optimizer took {self.optimizer.steps} steps, the run "
                f"{iteration}"
            )
        together(lambda: require_filled(self.model, checkpoints.path(iteration)), only_leader=False)
        self.iteration = iteration
        self.progress = Progress(**state.progress)
        self.objective.absent.update(self.progress.absent_spans)


@contextmanager
def closed_on_failure(engine: Engine) -> Iterator[None]:
    """Close an engine's live sources where the block ends with an exception, before anyone is told of it."""
    try:
        yield
    except BaseException:
        engine.close_live()
        raise


def _inputs(batch: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the model reads of a micro-batch."""
    return batch["tokens"], batch["position_ids"], batch["doc_id"]
