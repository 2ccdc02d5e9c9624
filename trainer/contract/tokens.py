"""Tokens of an experiment's training runs, and what the store of its teacher's scores takes."""

from dataclasses import asdict, dataclass
from typing import Any

from trainer.contract.mix import mix_of
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.sources import GeneratedSynth, HubSynth
from trainer.contract.topk.size import token_bytes

CORPUS_ROWS = 75_958_895
"""Conversations of PleIAs/SYNTH, without the rows that are skipped."""
TOKENS_PER_ROW = 856
SUPERVISED = 0.831
"""Mean length of a conversation, and the share of its tokens that is supervised, of a build of 1000 rows."""


@dataclass(frozen=True)
class RunTokens:
    """The tokens of one training run, padding included.

    Attributes:
        steps: Its steps.
        tokens: Tokens of all samples.
        by_kind: Of these, those of each kind of samples.
    """

    steps: int
    tokens: int
    by_kind: dict[str, int]


@dataclass(frozen=True)
class StoreSize:
    """What `teacher_topk` scores and takes; with `mass`, by which a token may have fewer ids, at most.

    Attributes:
        conversations: That a teacher scores; None where nobody knows how many there are before they are read.
        tokens: Their supervised tokens.
        bytes_per_token: Of the store.
        plain_bytes_per_token: Of the same as int32 and fp16.
        bytes: Of the store.
        plain_bytes: Of the same as int32 and fp16.
    """

    conversations: int | None
    tokens: int | None
    bytes_per_token: float
    plain_bytes_per_token: int
    bytes: int | None
    plain_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values, those that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def run_tokens(experiment: Experiment) -> dict[str, RunTokens]:
    """Count the tokens of every training run.

    Args:
        experiment: The loaded config.

    Returns:
        The tokens by asset, in the order of the ladder.
    """
    found = {}
    for asset in experiment.runs():
        recipe = experiment.train_recipe(asset)
        tokens = recipe.steps * recipe.training.global_batch_size * recipe.seq_len
        shares = mix_of(recipe).shares
        found[asset] = RunTokens(
            recipe.steps, tokens, {kind: round(tokens * share) for kind, share in shares.items()}
        )
    return found


def store_size(experiment: Experiment) -> StoreSize | None:
    """Estimate what the store of the teacher's scores takes; None where the experiment has none."""
    store = experiment.stages.teacher_topk
    if store is None:
        return None
    each = token_bytes(store.topk, store.tail_draws)
    rows = _rows(experiment)
    if rows is None:
        return StoreSize(None, None, each.stored, each.plain, None, None)
    valid = experiment.data.synth_kd_v1.valid_fraction
    scored = round(rows * (valid + (1 - valid) * store.subset_fraction))
    tokens = round(scored * TOKENS_PER_ROW * SUPERVISED)
    return StoreSize(
        scored, tokens, each.stored, each.plain, round(tokens * each.stored), tokens * each.plain
    )


def _rows(experiment: Experiment) -> int | None:
    """Conversations of the data set, where the config tells."""
    source, most = experiment.sources.synth, experiment.data.synth_kd_v1.max_rows
    if isinstance(source, GeneratedSynth):
        rows = source.rows
    elif isinstance(source, HubSynth) and not source.files:
        rows = CORPUS_ROWS
    else:
        return most if most > 0 else None
    return min(rows, most) if most > 0 else rows
