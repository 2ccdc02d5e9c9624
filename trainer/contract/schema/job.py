"""`job.json`: what the orchestrator asks of the trainer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.json_text import parse_json
from trainer.contract.schema.base import ConfigError, Count, Frozen, Name, PositiveInt, parse
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.contract.schema.profile import ProfileRecipe
from trainer.contract.schema.rungs.ladder import parse_convert_recipe
from trainer.contract.schema.rungs.rung import ConversionRecipe, named_inputs
from trainer.contract.schema.score import ScoreRecipe
from trainer.contract.schema.training import TrainRecipe

_Text = Annotated[str, Field(min_length=1)]


class JobInput(Frozen):
    """An input artifact: where its files are, and the content digest they must have."""

    path: _Text
    digest: _Text


Ranks = Annotated[PositiveInt, Field(le=65536)]
"""Plans list every rank, so there is an end to them; the largest published runs have some 16,000."""


class Execution(Frozen):
    """Where and how a job runs; never part of an artifact's identity.

    Megatron's convention: `nproc = tp × dp` processes, and the expert-parallel ranks are found inside the
    data-parallel ones, so `ep` divides `dp`.

    Attributes:
        launcher: What started it; for the record.
        verify_resume: Repeat the last steps of a training run from their checkpoint, and report by how much
            they differ.
        teacher_url_env: Environment variable with the addresses of a served teacher's replicas.
    """

    device: Literal["cpu", "cuda"]
    nproc: Ranks = 1
    dp: Ranks = 1
    tp: Ranks = 1
    ep: Ranks = 1
    launcher: str = "local"
    wandb: Literal["offline", "online", "disabled"] = "offline"
    resume: bool = True
    verify_resume: bool = True
    per_layer_router_metrics: bool = False
    teacher_url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.nproc != self.tp * self.dp:
            raise ValueError(
                f"nproc = {self.nproc}, but tp × dp = {self.tp} × {self.dp} = {self.tp * self.dp}; "
                "they must be equal"
            )
        if self.dp % self.ep:
            raise ValueError(
                f"ep = {self.ep} does not divide dp = {self.dp}; expert-parallel ranks are found "
                "inside the data-parallel ones"
            )
        return self

    def check_recipe(self, recipe: TrainRecipe) -> None:
        """Refuse a layout that the recipe's shapes do not divide into.

        Raises:
            ConfigError: Naming the execution key, the recipe key and their values.
        """
        model, moe = recipe.architecture.model, recipe.architecture.moe
        training = recipe.training
        rules = [
            ("tp", self.tp, "model.num_query_groups", model.num_query_groups),
            ("tp", self.tp, "model.num_attention_heads", model.num_attention_heads),
            ("tp", self.tp, "vocab_size", recipe.architecture.vocab_size),
            ("tp", self.tp, "dense FFN width", model.dense_ffn_hidden_size or model.ffn_hidden_size),
            (
                "dp × micro_batch_size",
                self.dp * training.micro_batch_size,
                "global_batch_size",
                training.global_batch_size,
            ),
        ]
        if moe is not None:
            rules.append(("ep", self.ep, "moe.num_experts", moe.num_experts))
            if moe.shared_expert_size is not None:
                rules.append(("tp", self.tp, "moe.shared_expert_size", moe.shared_expert_size))
        elif self.ep > 1:
            raise ConfigError(f"execution.ep = {self.ep}, but the model has no experts; allowed: 1")
        problems = [
            f"execution.{key} = {value} does not divide {name} = {total}"
            for key, value, name, total in rules
            if total % value
        ]
        if problems:
            raise ConfigError(problems)


class Part(Frozen):
    """One checkpoint of an evaluation: it has an identity of its own, and a place that outlives the job.

    Attributes:
        recipe_fingerprint: Of its measurement alone, whatever else the job measures.
        work_dir: Where its finished tasks are kept, and measuring it goes on.
        output_dir: Gets `payload/` and, last, `summary.json`, as soon as it is measured.
    """

    recipe_fingerprint: _Text
    work_dir: _Text
    output_dir: _Text


class Provenance(Frozen):
    """The code that asked for the job.

    Attributes:
        snapshot: sha256 of the archive of the sources that the job was started from, where there is one.
    """

    git_sha: _Text
    git_dirty: bool
    source_digest: _Text
    lock_digest: _Text
    snapshot: _Text | None = None


class Job(Frozen):
    """One job of the trainer: the content of `job.json`.

    Attributes:
        command: What is done.
        asset: Name of what is made.
        recipe: All that decides the bytes, resolved; the command says which tables it has.
        recipe_fingerprint: Of recipe, code, packages and inputs: what the asset is known by.
        inputs: By name: an upstream asset, or a key of the recipe that is an `InputName`.
        execution: Where and how it runs, which decides no identity.
        provenance: The code that asked for it.
        work_dir: Outlives a crash; a restart goes on from what is in it.
        output_dir: Gets `payload/` and, last, `summary.json`.
        parts: Of an evaluation, by checkpoint; one that is not named works and delivers in a subdirectory of
            the job's own directories.
    """

    schema_: Literal["vpmoe.job/1"] = Field(alias="schema", default="vpmoe.job/1")
    command: Literal["convert", "train", "evaluate", "score", "profile"]
    asset: Name
    experiment: Name
    recipe: dict[str, Any]
    recipe_fingerprint: _Text
    seed: Count
    inputs: dict[str, JobInput]
    execution: Execution
    provenance: Provenance
    work_dir: _Text
    output_dir: _Text
    parts: dict[Name, Part] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.parts and self.command != "evaluate":
            raise ValueError(f"parts: a job of {self.command!r} has none; an 'evaluate' job has")
        return self

    def part(self, checkpoint: str) -> Part:
        """Return where a checkpoint of an evaluation is measured."""
        return self.parts.get(checkpoint) or Part(
            recipe_fingerprint=self.recipe_fingerprint,
            work_dir=f"{self.work_dir}/{checkpoint}",
            output_dir=f"{self.output_dir}/{checkpoint}",
        )

    def train_recipe(self) -> TrainRecipe:
        """Return the recipe of a `train` job, checked against the job's layout.

        Raises:
            ConfigError: Another command, a malformed recipe, or a layout that does not fit it.
        """
        if self.command != "train":
            raise ConfigError(f"command: found {self.command!r}; only a 'train' job has a training recipe")
        recipe = parse(TrainRecipe, self.recipe, origin="recipe")
        self.execution.check_recipe(recipe)
        return recipe

    def convert_recipe(self) -> ConversionRecipe:
        """Return the recipe of a `convert` job, checked against the job's inputs.

        Raises:
            ConfigError: Another command, a malformed recipe, an input that the recipe names and the job
                lacks, or more than one process.
        """
        if self.command != "convert":
            raise ConfigError(
                f"command: found {self.command!r}; only a 'convert' job has a conversion recipe"
            )
        recipe = parse_convert_recipe(self.recipe)
        self._require(named_inputs(recipe).items(), "a conversion streams through one process")
        return recipe

    def evaluate_recipe(self) -> EvaluateRecipe:
        """Return the recipe of an `evaluate` job, checked against the job's inputs.

        Raises:
            ConfigError: Another command, a malformed recipe, a checkpoint that the recipe names and the job
                lacks, a part that is none of them, or more than one process.
        """
        if self.command != "evaluate":
            raise ConfigError(
                f"command: found {self.command!r}; only an 'evaluate' job has an evaluation recipe"
            )
        recipe = parse(EvaluateRecipe, self.recipe, origin="recipe")
        self._require(
            (("checkpoints", name) for name in recipe.checkpoints), "an evaluation runs in one process"
        )
        if unknown := sorted(self.parts.keys() - recipe.checkpoints.keys()):
            raise ConfigError(
                f"parts: {', '.join(unknown)} not among recipe.checkpoints, {', '.join(recipe.checkpoints)}"
            )
        return recipe

    def score_recipe(self) -> ScoreRecipe:
        """Return the recipe of a `score` job, checked against the job's inputs.

        Raises:
            ConfigError: Another command, a malformed recipe, an input that is missing, or more than one
                process.
        """
        if self.command != "score":
            raise ConfigError(f"command: found {self.command!r}; only a 'score' job has a recipe of scores")
        recipe = parse(ScoreRecipe, self.recipe, origin="recipe")
        named = [("scores", "synth_kd_v1"), ("scores", "teacher")]
        if recipe.reasoning_mode != recipe.stored_mode:
            named.append(("reasoning_mode", "o200k_tokenizer"))
        self._require(named, "a teacher scores in processes of their own (score --shard), so in a job of one")
        return recipe

    def profile_recipe(self) -> ProfileRecipe:
        """Return the recipe of a `profile` job, checked against the job's layout.

        Raises:
            ConfigError: Another command, a malformed recipe, or a layout that does not fit it.
        """
        if self.command != "profile":
            raise ConfigError(f"command: found {self.command!r}; only a 'profile' job has a recipe of one")
        recipe = parse(ProfileRecipe, self.recipe, origin="recipe")
        self.execution.check_recipe(recipe)
        return recipe

    def _require(self, named: Iterable[tuple[str, str]], alone: str) -> None:
        """Refuse a job that lacks an input which its recipe names, or that has several processes.

        Args:
            named: Key of the recipe and name of the input.
            alone: Why there is one process.
        """
        problems = [
            f"inputs.{name}: missing; recipe.{key} names it, found {', '.join(self.inputs) or 'none'}"
            for key, name in named
            if name not in self.inputs
        ]
        if self.execution.nproc != 1:
            problems.append(f"execution.nproc = {self.execution.nproc}; {alone}: set 1")
        if problems:
            raise ConfigError(problems)


def load_job(path: str | Path) -> Job:
    """Read and check a job file; and its recipe where the command has one, before any work.

    Raises:
        ConfigError: The file is missing, not JSON, or a key is unknown, missing or wrong.
    """
    path = Path(path)
    try:
        raw = parse_json(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a job file: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"not valid JSON: {error}", origin=str(path)) from None
    job = parse(Job, raw, origin=path.name)
    if job.command == "train":
        job.train_recipe()
    elif job.command == "convert":
        job.convert_recipe()
    elif job.command == "evaluate":
        job.evaluate_recipe()
    elif job.command == "score":
        job.score_recipe()
    elif job.command == "profile":
        job.profile_recipe()
    return job
