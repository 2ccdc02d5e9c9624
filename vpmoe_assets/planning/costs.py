"""What making an asset takes, from the experiment's file and from past runs; nothing is asked of a network.

Memory and disk of a training are planned by the trainer's own functions. Time is that of the last run of the
asset in this experiment; of a training that never ran here it is estimated from its arithmetic, 6 operations
for each token and active parameter, at a rate that a run on such a device reaches at least in order of
magnitude.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from trainer.contract.assets import TEACHER
from trainer.contract.disk import disk_plan, weight_bytes
from trainer.contract.memory import WIDTHS, Layout, memory_plan
from trainer.contract.parameters import count_parameters
from trainer.contract.schema.base import parse
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.job import Execution
from trainer.contract.schema.rungs.rung import RungConfig
from trainer.contract.schema.sources import HubDonor, HubVocabulary, ZipCore8
from trainer.contract.tokens import run_tokens, store_size
from vpmoe_assets.lineage.record import Record

Basis = Literal["last run", "estimate"]

RATES = {"cpu": 2e10, "cuda": 1e14}
"""Operations per second of one process, or one GPU, in a training of ours."""


@dataclass(frozen=True)
class Download:
    """What is fetched from elsewhere.

    Attributes:
        what: Repository and commit, or address.
        at_least: Bytes that its geometry takes; None where the file says nothing of its size.
    """

    what: str
    at_least: int | None = None


@dataclass(frozen=True)
class Cost:
    """What making an asset takes; None is unknown.

    Attributes:
        seconds: Time.
        basis: What that is taken from.
        tokens: Of a training, padding included; of a teacher's store, those that are scored.
        memory: Bytes on each device at the peak of a step.
        disk: Bytes of what it writes, with the checkpoints that lie there at once.
        download: What is fetched first.
    """

    seconds: float | None = None
    basis: Basis | None = None
    tokens: int | None = None
    memory: int | None = None
    disk: int | None = None
    download: Download | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "seconds": self.seconds,
            "seconds_from": self.basis,
            "tokens": self.tokens,
            "memory_bytes_per_device": self.memory,
            "disk_bytes": self.disk,
            "download": self.download and {"what": self.download.what, "at_least": self.download.at_least},
        }


class Costs:
    """What the assets of an experiment take.

    Args:
        experiment: The experiment.
        run_config: Dagster's, with the settings of the `trainer` resource, if any.

    Raises:
        ConfigError: The settings contradict each other.
    """

    def __init__(self, experiment: Experiment, run_config: Mapping[str, Any] | None = None) -> None:
        self._experiment = experiment
        self.execution = execution_of(run_config or {})
        self._tokens = run_tokens(experiment)

    def of(self, asset: str, last: Record | None) -> Cost:
        """Return what making an asset takes.

        Args:
            asset: Bare name.
            last: Its latest record in this experiment.
        """
        cost = self._training(asset) if asset in self._tokens else self._other(asset)
        if last is None:
            return cost
        disk = max(last.size, cost.disk or 0)
        seconds = _seconds(last)
        if last.execution.get("device", "cpu") != self.execution.device:
            return replace(cost, disk=disk)
        return replace(cost, seconds=seconds, basis="last run", disk=disk)

    def _training(self, asset: str) -> Cost:
        recipe, how = self._experiment.train_recipe(asset), self.execution
        arch, tokens = recipe.architecture, self._tokens[asset].tokens
        plan = memory_plan(
            arch,
            recipe.training,
            Layout(how.dp, how.tp, how.ep),
            seq_len=recipe.seq_len,
            device=how.device,
        )
        seconds = 6 * count_parameters(arch).active * tokens / (RATES[how.device] * how.nproc)
        return Cost(seconds, "estimate", tokens, plan.total, disk_plan(recipe).total)

    def _other(self, asset: str) -> Cost:
        sources = self._experiment.sources
        if asset == "teacher_topk":
            size = store_size(self._experiment)
            return Cost() if size is None else Cost(tokens=size.tokens, disk=size.bytes)
        if asset in self._experiment.rungs and isinstance(self._experiment.rungs[asset], RungConfig):
            training = self._experiment.training
            dtype = self._experiment.rung_dtype(asset)
            disk = weight_bytes(
                self._experiment.architecture(asset), training.model_copy(update={"dtype": dtype})
            )
            return Cost(disk=disk)
        named = {
            "qwen3_0_6b": sources.qwen3_0_6b,
            "gpt_oss_20b": sources.gpt_oss_20b,
            "synth": sources.synth,
            "healing_corpus": sources.healing_corpus,
            "core8_bundle": sources.core8,
            TEACHER: sources.teacher,
        }
        download = _download(named.get(asset))
        return Cost(disk=None if download is None else download.at_least, download=download)


def execution_of(run_config: Mapping[str, Any]) -> Execution:
    """Return how jobs run under a run configuration.

    Raises:
        ConfigError: A setting is none, or they contradict each other.
    """
    value: Any = run_config
    for key in ("resources", "trainer", "config"):
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    given = value if isinstance(value, Mapping) else {}
    known = {key: given[key] for key in ("device", "nproc", "dp", "tp", "ep") if key in given}
    return parse(Execution, {"device": "cpu", **known}, origin="resources.trainer.config")


def _download(source: Any) -> Download | None:
    if isinstance(source, ZipCore8):
        return Download(source.url or "the evaluation bundle")
    repo = getattr(source, "repo", None)
    if repo is None:
        return None
    revision = source.revision[:8] or "not pinned"
    return Download(f"{repo}@{revision}", _least(source))


def _least(source: Any) -> int | None:
    """Return the bytes that weights of a pinned geometry take in bf16."""
    width = WIDTHS["bf16"]
    if isinstance(source, HubVocabulary):
        return 2 * source.vocab_size * source.hidden_size * width
    if not isinstance(source, HubDonor):
        return None
    attention = (
        source.hidden_size
        * source.head_dim
        * (2 * source.num_attention_heads + 2 * source.num_key_value_heads)
    )
    layer = attention + 3 * source.hidden_size * source.intermediate_size
    heads = 1 if source.tie_word_embeddings else 2
    return width * (source.num_layers * layer + heads * source.vocab_size * source.hidden_size)


def _seconds(record: Record) -> float:
    own = record.execution.get("seconds")  # of an evaluation: several share one job
    if isinstance(own, int | float):
        return float(own)
    began, ended = (datetime.fromisoformat(each) for each in (record.started_utc, record.finished_utc))
    return max(0.0, (ended - began).total_seconds())
