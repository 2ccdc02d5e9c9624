"""An experiment: one TOML file that holds every knob of identity, resolved and checked as a whole."""

import difflib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.assets import TEACHER, TEACHER_TOPK
from trainer.contract.credentials import credential_line, find_credential, secret_values
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import (
    ConfigError,
    Count,
    Frozen,
    Name,
    parse,
    plain,
)
from trainer.contract.schema.data import Data
from trainer.contract.schema.distillation import KDConfig, ScoredData
from trainer.contract.schema.donor import Donor
from trainer.contract.schema.evaluate import (
    Checkpoint,
    Core8Protocol,
    EvaluateRecipe,
    Evaluation,
    HuggingFaceCheckpoint,
    MegatronCheckpoint,
)
from trainer.contract.schema.inheritance import EXTENDS, extend, inherit, written
from trainer.contract.schema.profile import Profile, ProfileRecipe
from trainer.contract.schema.rungs.ladder import WITHOUT_GEOMETRY, Rungs, parse_convert_recipe
from trainer.contract.schema.rungs.rung import (
    GEOMETRY_TABLES,
    ConversionRecipe,
    Dtype,
    Healing,
    Place,
    RungConfig,
    named_inputs,
)
from trainer.contract.schema.score import ScoreRecipe
from trainer.contract.schema.sources import ArtifactTeacher, Sources
from trainer.contract.schema.stages import (
    OfflineStage,
    OnPolicyStage,
    StageConfig,
    Stages,
    check_stages,
)
from trainer.contract.schema.training import OptimizerConfig, TrainingConfig, TrainRecipe, check_fusions

CONFIGS_DIR = Path(__file__).resolve().parents[3] / "configs"
STUDENT = "vpmoe"
FIRST_STAGE = "vpmoe_stage1"
_HEALED = "_healed"
_MAX_LEN = 2048


class Experiment(Frozen):
    """A whole experiment, every table resolved.

    Attributes:
        strict_toolchain: Reuse nothing that was made with another release of torch or megatron-core. The one
            key that is in no recipe: it says what is good enough, not what is made.
    """

    schema_: Literal["vpmoe.experiment/1"] = Field(alias="schema")
    name: Name
    seed: Count
    sources: Sources
    data: Data
    rungs: Rungs
    training: TrainingConfig
    stages: Stages
    evaluation: Evaluation | None = None
    profile: Profile = Profile()
    strict_toolchain: bool = False

    @cached_property
    def written(self) -> str:
        """The text that it was read from; empty where it was not read from a file."""
        return ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, rung in self.rungs.items():
            if any(getattr(self.sources, source) is None for source in rung.NEEDS):
                needed = " and ".join(f"sources.{source}" for source in rung.NEEDS)
                raise ValueError(f"rungs.{name} needs {needed}")
        seq_len = self.data.synth_kd_v1.seq_len
        for name, rung in self.rungs.items():
            if isinstance(rung, RungConfig) and (rung.healing or name == STUDENT):
                longest = rung.attention.max_sequence_length
                if seq_len > longest:
                    raise ValueError(
                        f"data.synth_kd_v1.seq_len = {seq_len} is more than "
                        f"rungs.{name}.attention.max_sequence_length = {longest}"
                    )
        check_stages(self.stages, self.sources)
        self._check_teacher()
        for name in self.stages.runs():
            try:
                check_fusions(self.rungs.vpmoe.moe, self.stages[name].training)
            except ValueError as error:
                raise ValueError(f"stages.{name}: rungs.vpmoe.{error}") from None
        if self.evaluation is not None:
            self._check_evaluation(self.evaluation)
        return self

    def _check_teacher(self) -> None:
        teacher = self.sources.teacher
        if isinstance(teacher, ArtifactTeacher) and teacher.asset not in (able := self._teachers()):
            raise ValueError(
                f"sources.teacher.asset = {teacher.asset!r}: not a run that a teacher can be made from; "
                f"allowed: {', '.join(able)}"
            )

    def _teachers(self) -> tuple[str, ...]:
        """Return the runs of the student's own model that need no teacher."""
        return tuple(name for name in self.stages.runs() if isinstance(self.stages[name], StageConfig))

    def _check_evaluation(self, evaluation: Evaluation) -> None:
        if "core8" in evaluation.suites and self.sources.core8 is None:
            raise ValueError("evaluation.suites has 'core8', which needs the table sources.core8")
        if evaluation.max_len is not None and evaluation.max_len > (shortest := self._shortest_context()):
            raise ValueError(
                f"evaluation.max_len = {evaluation.max_len} is more than the attention.max_sequence_length = "
                f"{shortest} of a rung; every checkpoint is measured with the same max_len, so lower it"
            )

    def _shortest_context(self) -> int:
        rungs = (rung for _, rung in self.rungs.items() if isinstance(rung, RungConfig))
        return min(rung.attention.max_sequence_length for rung in rungs)

    def architecture(self, rung: str) -> Architecture:
        """Geometry of a rung over the experiment's vocabulary.

        Args:
            rung: Asset name of the rung (`"vpdense_28"`).

        Raises:
            ConfigError: No such rung, or one whose geometry is the donor's.
        """
        table = self.rungs[rung]
        if not isinstance(table, RungConfig):
            raise ConfigError(
                f"rungs.{rung}: has no geometry of its own; it is the donor's (sources.qwen3_0_6b) over "
                f"{self.sources.tokenizer.vocab_size} tokens"
            )
        return Architecture(
            vocab_size=self.sources.tokenizer.vocab_size,
            **{name: getattr(table, name) for name in GEOMETRY_TABLES},
        )

    def train_recipe(self, asset: str) -> TrainRecipe:
        """Return the complete recipe of a training run.

        Args:
            asset: A stage (`"vpmoe_stage1"`), a healed rung (`"vpdense_28_healed"`), or `"teacher"` where
                that is one of the experiment's own runs, trained on.

        Raises:
            ConfigError: The experiment does not train this asset.
        """
        if asset.endswith(_HEALED) and (rung := asset.removesuffix(_HEALED)) in self.rungs:
            return self._healing_recipe(rung)
        if asset == TEACHER and isinstance(teacher := self.sources.teacher, ArtifactTeacher):
            longer = {"steps": teacher.extra_steps, "init": "checkpoint"}
            return self.train_recipe(teacher.asset).model_copy(update=longer)
        if asset not in self.stages.runs():
            raise ConfigError(
                f"{asset}: not a training run of this experiment, which has {', '.join(self.runs())}"
            )
        return self._stage_recipe(self.stages[asset])

    def _stage_recipe(self, stage: StageConfig | OfflineStage | OnPolicyStage) -> TrainRecipe:
        kd = stage.resolved_kd() if isinstance(stage, OfflineStage) else KDConfig(**dict(stage.kd))
        return TrainRecipe(
            architecture=self.architecture(STUDENT),
            training=stage.training,
            steps=stage.steps,
            seq_len=self.data.synth_kd_v1.seq_len,
            pack_block=self.data.synth_kd_v1.pack.block,
            objective=stage.objective,
            kd=kd,
            scored=self._scored(stage) if isinstance(stage, OfflineStage) else None,
            rollouts=stage.rollouts() if isinstance(stage, OnPolicyStage) else None,
            init=stage.init,
        )

    def profile_recipe(self) -> ProfileRecipe:
        """Return the complete recipe of the profile: the first stage from its seed, a few steps long."""
        return self.profile.recipe(self.train_recipe(FIRST_STAGE))

    def _scored(self, stage: OfflineStage) -> ScoredData:
        store = self.stages.teacher_topk
        assert store is not None  # check_stages
        return ScoredData(
            fraction=stage.scored_fraction,
            subset_fraction=store.subset_fraction,
            topk=store.topk,
            tail_draws=store.tail_draws,
        )

    def score_recipe(self) -> ScoreRecipe:
        """Return the complete recipe of the top-K store.

        A teacher with weights computes in the type that evaluations do, with their backend.

        Raises:
            ConfigError: The experiment has no `[stages.teacher_topk]`.
        """
        store, teacher = self.stages.teacher_topk, self.sources.teacher
        if store is None:
            raise ConfigError("stages.teacher_topk: missing, so no teacher scores anything")
        assert teacher is not None  # check_stages
        measured = self.evaluation
        asked = {
            "reasoning_mode": teacher.reasoning_mode,
            "stored_mode": self.data.synth_harmony.reasoning_effort.lower(),
            "dtype": "fp32" if measured is None else measured.dtype,
            "backend": "reference" if measured is None else measured.backend,
        }
        return parse(ScoreRecipe, plain(store) | asked, origin="stages.teacher_topk")

    def convert_recipe(self, asset: str) -> ConversionRecipe:
        """Return the complete recipe of a conversion.

        Args:
            asset: A rung (`"vpdense_28"`).

        Raises:
            ConfigError: No such rung, one without a surgery table, or one that cannot be made from the rung
                before it.
        """
        table = self.rungs[asset]
        if table.surgery is None:
            raise ConfigError(f"rungs.{asset}.surgery: missing, so {asset} cannot be made from its parent")
        raw = {"step": table.RECIPE.model_fields["step"].default, "surgery": plain(table.surgery)}
        return parse_convert_recipe(raw | table.keys(self._place(asset)), origin=f"rungs.{asset}")

    def convert_inputs(self, asset: str) -> tuple[str, ...]:
        """Return the assets that a conversion is made from: those that its recipe names."""
        return tuple(named_inputs(self.convert_recipe(asset)).values())

    def _place(self, asset: str) -> Place:
        before = self._before(asset)
        source = before and before + (_HEALED if getattr(self.rungs[before], "healing", None) else "")
        return Place(
            asset,
            self.sources,
            *self._geometry(asset),
            before,
            source,
            *self._geometry(before),
        )

    def _geometry(self, rung: str | None) -> tuple[Architecture | None, Dtype | None]:
        """Architecture and storage type of a rung; None where they are the donor's."""
        if rung is None or not isinstance(self.rungs[rung], RungConfig):
            return None, None
        return self.architecture(rung), self.rung_dtype(rung)

    def _before(self, rung: str) -> str | None:
        """Name of the rung before another, None for the first of this experiment."""
        names = self.rungs.names()
        return names[names.index(rung) - 1] if names.index(rung) else None

    def ladder(self) -> tuple[str, ...]:
        """Every checkpoint of the experiment, in the order in which one is made from another."""
        donors = ("qwen3_0_6b",) if self.sources.qwen3_0_6b is not None else ()
        rungs = [
            made
            for name, rung in self.rungs.items()
            for made in ((name, name + _HEALED) if getattr(rung, "healing", None) else (name,))
            if rung.surgery is not None
        ]
        return (*donors, *rungs, *self.stages.runs())

    def evaluate_recipe(self, *objects: str) -> EvaluateRecipe:
        """Return the complete recipe of an evaluation.

        Args:
            objects: Checkpoints to measure (`"vpdense_28_healed"`).

        Raises:
            ConfigError: The experiment has no such checkpoint, or no `[evaluation]`.
        """
        if self.evaluation is None:
            raise ConfigError("evaluation: missing, so this experiment measures nothing")
        ladder = self.ladder()
        if unknown := [name for name in objects if name not in ladder]:
            raise ConfigError(
                f"{', '.join(unknown)}: not a checkpoint of this experiment, which has {', '.join(ladder)}"
            )
        core8 = self.sources.core8
        return EvaluateRecipe(
            checkpoints={name: self._checkpoint(name) for name in sorted(objects, key=ladder.index)},
            suites=self.evaluation.suites,
            max_len=self.evaluation.max_len or min(_MAX_LEN, self._shortest_context()),
            dtype=self.evaluation.dtype,
            backend=self.evaluation.backend,
            ppl_tokens=self.evaluation.ppl_tokens,
            generation=self.evaluation.generation,
            core8=Core8Protocol(seed=core8.seed, max_per_task=core8.max_per_task) if core8 else None,
        )

    def _checkpoint(self, name: str) -> Checkpoint:
        """Return what is expected of a checkpoint that is to be measured."""
        donor = self.sources.qwen3_0_6b
        rung = STUDENT if name in self.stages.runs() else name.removesuffix(_HEALED)
        if isinstance(self.rungs.get(rung), RungConfig):
            return MegatronCheckpoint(architecture=self.architecture(rung))
        assert donor is not None
        keys = [key for key in Donor.model_fields if key != "num_layers"]
        geometry = {key: getattr(donor, key) for key in keys} | {"num_hidden_layers": donor.num_layers}
        if rung in self.rungs:
            geometry["vocab_size"] = self.sources.tokenizer.vocab_size
        return HuggingFaceCheckpoint(geometry=geometry)

    def rung_dtype(self, rung: str) -> Dtype:
        """Storage type of a Megatron rung: that of the run which trains it next."""
        if rung == STUDENT:
            return self.stages.vpmoe_stage1.training.dtype
        healing: Healing | None = self.rungs[rung].healing
        return (healing.training if healing else self.training).dtype

    def runs(self) -> tuple[str, ...]:
        """Assets that are made by training, in the order of the ladder."""
        healed = [name + _HEALED for name, rung in self.rungs.items() if getattr(rung, "healing", None)]
        stages = list(self.stages.runs())
        if isinstance(teacher := self.sources.teacher, ArtifactTeacher):
            stages.insert(stages.index(teacher.asset) + 1, TEACHER)
        return (*healed, *stages)

    def _healing_recipe(self, rung: str) -> TrainRecipe:
        healing: Healing | None = getattr(self.rungs[rung], "healing", None)
        if healing is None:
            raise ConfigError(f"rungs.{rung}.healing: missing, so {rung}{_HEALED} cannot be trained")
        optimizer = scaled_to(healing.training.optimizer, healing.learning_rate)
        return TrainRecipe(
            architecture=self.architecture(rung),
            training=healing.training.model_copy(update={"optimizer": optimizer}),
            steps=healing.new_layers_only_steps + healing.steps,
            seq_len=self.data.synth_kd_v1.seq_len,
            pack_block=self.data.synth_kd_v1.pack.block,
            init="checkpoint",
            harmony_fraction=healing.harmony_fraction,
            objective=healing.objective,
            new_layers_only_steps=healing.new_layers_only_steps,
            new_layers=self._new_layers(rung) if healing.new_layers_only_steps else (),
        )

    def _new_layers(self, rung: str) -> tuple[int, ...]:
        """Layers that a rung has and its parent lacks."""
        before, new = self._before(rung), ()
        if before is not None and isinstance(parent := self.rungs[before], RungConfig):
            try:
                new = self.rungs[rung].new_layers(parent)
            except ValueError as error:
                raise ConfigError(f"rungs.{rung}: {error}") from None
        if not new:
            raise ConfigError(
                f"rungs.{rung}.healing.new_layers_only_steps: this rung has no layers that a parent of this "
                "experiment lacks; set it to 0"
            )
        return new


def scaled_to(optimizer: OptimizerConfig, lr: float) -> OptimizerConfig:
    """Return the same optimizer with peak rate `lr` and the other groups' rates in proportion."""
    ratio = lr / optimizer.lr
    rates = {name: getattr(optimizer, name) for name in ("normuon_aux_lr", "decoupled_lr")}
    scaled = {name: rate * ratio for name, rate in rates.items() if rate is not None}
    return optimizer.model_copy(update={"lr": lr, **scaled})


def load_experiment(name_or_path: str | Path) -> Experiment:
    """Read an experiment.

    Args:
        name_or_path: A bare name (`"smoke"` reads `configs/smoke.toml`) or the path of a `.toml` file.

    Raises:
        ConfigError: No such file, not TOML, or a key that is unknown, missing or wrong.
    """
    path = experiment_file(name_or_path)
    own, text = _read(path)
    raw = _extended(own, path, ())
    origin = f"{path.name} over {own[EXTENDS]}.toml" if EXTENDS in own else path.name
    merged, inherited = inherit(raw, WITHOUT_GEOMETRY, {TEACHER_TOPK})
    experiment = parse(
        Experiment, merged, origin=origin, source_path=lambda key: written(key, raw, inherited)
    )
    if not str(name_or_path).endswith(".toml") and experiment.name != name_or_path:
        raise ConfigError(
            f"name: found {experiment.name!r}; expected {name_or_path!r}, as the file is called",
            origin=path.name,
        )
    experiment.__dict__["written"] = text  # beside the fields: it is no part of what makes two of them equal
    return experiment


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Return the tables of a file, and its text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors write a byte order mark
        raw = tomllib.loads(text)
        secrets = secret_values()
        key = find_credential(raw, secrets)
    except (ValueError, RecursionError) as error:  # not UTF-8, no TOML, a number of 5000 digits, depth
        raise ConfigError(f"not valid TOML: {error}", origin=str(path)) from None
    if key:
        raise ConfigError(f"{key.removeprefix('$.')}: {_HELD}", origin=path.name)
    if line := credential_line(text, secrets):
        raise ConfigError(f"line {line}: {_HELD}", origin=path.name)
    return raw, text


_HELD = "found a credential; records keep this file, so take it out and pass it in an environment variable"


def _extended(raw: dict[str, Any], path: Path, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the tables of a file over those of the experiment that it extends, if it does.

    Args:
        raw: Its tables.
        path: Of the file.
        above: Names of the experiments that extend it, the first one first.
    """
    if EXTENDS not in raw:
        return raw
    name = raw[EXTENDS]
    if not isinstance(name, str) or name.endswith(".toml"):
        raise ConfigError(
            f"{EXTENDS}: found {name!r}; expected the name of an experiment in {CONFIGS_DIR.name}/, which is "
            "part of the sources that records keep",
            origin=path.name,
        )
    if name in above:
        raise ConfigError(f"{EXTENDS}: {' → '.join((*above, name))} is a circle", origin=path.name)
    try:
        base = experiment_file(name)
    except ConfigError as error:
        raise ConfigError(f"{EXTENDS}: {error}", origin=path.name) from None
    return extend(_extended(_read(base)[0], base, (*above, name)), raw)


def experiment_file(name_or_path: str | Path) -> Path:
    """Return the file of an experiment.

    Args:
        name_or_path: A name, or the path of its TOML file.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    if str(name_or_path).endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such experiment file")
        return path
    path = CONFIGS_DIR / f"{name_or_path}.toml"
    names = sorted(file.stem for file in CONFIGS_DIR.glob("*.toml"))
    if str(name_or_path) not in names:
        close = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no experiment called {str(name_or_path)!r}; there are {', '.join(names)}{hint}")
    return path
