"""A small language, a teacher that really knows it better, and a student: what benchmarks of learning share.

The language has 512 tokens. A document opens with one of 16 topics; every further token is drawn by one of
four rules. Three are tables of 64 successors with Zipf's probabilities: by the last token (half of all),
by the one before it, and by the topic (a fifth each); the fourth draws out of the whole vocabulary (a tenth).
The tables come from one seed. The best that a model can do is known token by token, the distributions have
long tails, and a student that saw little of the tables guesses where a teacher knows.

Models are this project's: `build_model` of a dense rung with other sizes, trained by the `Engine` with its
optimizer, samplers and objectives. Only the data sets are made here, in memory.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.contract.kinds import CONVERSATIONS, SCORED
from trainer.contract.mix import mix_of
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.training import TrainRecipe
from trainer.data.kd import Sample
from trainer.job.distributed import Layout
from trainer.model.gpt import VPGPTModel, build_model
from trainer.train.engine import Engine
from trainer.train.inputs import DataPart, TrainingData

VOCABULARY = 512
TOPICS = 16
LENGTH = 128
PROMPT = 16
"""First tokens of a document, which nobody is trained on."""
SUCCESSORS = 64
SHARES = (0.5, 0.2, 0.2, 0.1)
"""Of the rules: by the last token, by the one before, by the topic, out of all."""
TEACHER = {"num_layers": 4, "hidden_size": 256, "head_dim": 64, "ffn_hidden_size": 1024}
STUDENT = {"num_layers": 2, "hidden_size": 64, "head_dim": 16, "ffn_hidden_size": 256}
BATCH = 32


class Language:
    """The source of all documents.

    Args:
        seed: Of its tables.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def table(rows: int) -> NDArray[np.int64]:
            return np.stack([rng.permutation(VOCABULARY)[:SUCCESSORS] for _ in range(rows)])

        self._last, self._before, self._topic = table(VOCABULARY), table(VOCABULARY), table(TOPICS)
        self._all = rng.permutation(VOCABULARY)
        zipf = [1 / (1 + np.arange(size)) for size in (SUCCESSORS, VOCABULARY)]
        self._few, self._many = (weights / weights.sum() for weights in zipf)

    def documents(self, count: int, seed: int, length: int = LENGTH + 1) -> NDArray[np.int64]:
        """Draw documents `[count, length]`; the first token is the topic."""
        rng = np.random.default_rng([seed, 1])
        tokens = np.empty((count, length), dtype=np.int64)
        topic = rng.integers(TOPICS, size=count)
        tokens[:, 0], tokens[:, 1] = topic, rng.integers(VOCABULARY, size=count)
        for t in range(2, length):
            rule = rng.choice(4, size=count, p=SHARES)
            few = rng.choice(SUCCESSORS, size=count, p=self._few)
            many = self._all[rng.choice(VOCABULARY, size=count, p=self._many)]
            by_rule = (
                self._last[tokens[:, t - 1], few],
                self._before[tokens[:, t - 2], few],
                self._topic[topic, few],
                many,
            )
            tokens[:, t] = np.choose(rule, by_rule)
        return tokens

    def log_probabilities(self, documents: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the true log-probability of each token but the first two, `[count, length - 2]`."""
        label = documents[:, 2:, None]
        topic = np.repeat(documents[:, :1], label.shape[1], axis=1)
        total = SHARES[3] * self._many[np.argsort(self._all)[documents[:, 2:]]]
        tables = ((self._last, documents[:, 1:-1]), (self._before, documents[:, :-2]), (self._topic, topic))
        for share, (table, context) in zip(SHARES, tables, strict=False):
            total = total + share * ((table[context] == label) * self._few).sum(axis=-1)
        return np.log(total)


def recipe_for(
    sizes: Mapping[str, int], steps: int, learning_rate: float = 3e-3, **changes: Any
) -> TrainRecipe:
    """Return a recipe of smoke's dense rung in other sizes over documents of the language.

    Args:
        sizes: Keys of `[model]`, and `vocabulary` for another than the language's.
        steps: Steps.
        learning_rate: Peak of every group of parameters.
        **changes: Further keys of the recipe.
    """
    smoke = load_experiment("smoke")
    recipe = copy.deepcopy(plain(smoke.train_recipe("vpmoe_stage1")))
    recipe["architecture"] = plain(smoke.architecture("vpdense_80"))
    sizes = {"vocabulary": VOCABULARY, "num_attention_heads": 4, "num_query_groups": 2, **sizes}
    recipe["architecture"]["vocab_size"] = sizes.pop("vocabulary")
    recipe["architecture"]["model"] |= sizes
    recipe["architecture"]["attention"] |= {"window_attn_skip_freq": 2, "max_sequence_length": LENGTH + 1}
    rates = dict.fromkeys(("lr", "normuon_aux_lr", "decoupled_lr"), learning_rate)
    recipe["training"] |= {"dtype": "fp32", "global_batch_size": BATCH, "micro_batch_size": BATCH}
    recipe["training"]["optimizer"] |= rates
    recipe |= {"steps": steps, "seq_len": LENGTH, "init": "fresh"}
    return parse(TrainRecipe, recipe | changes)


class Documents:
    """Documents as samples of one kind, in memory, each once an epoch and in order.

    Args:
        documents: `[N, LENGTH + 1]`.
        kind: Decides the spans: half of what follows the prompt is reasoning, the rest the answer.
        fields: Further fields of every sample, `[N, LENGTH, ...]`.
    """

    def __init__(
        self, documents: NDArray[np.int64], kind: str, fields: Mapping[str, Tensor] | None = None
    ) -> None:
        self.documents, self.fields = torch.from_numpy(documents), dict(fields or {})
        first = {CONVERSATIONS: 1, SCORED: 4}[kind]
        self._span = torch.zeros(LENGTH, dtype=torch.int64)
        middle = (LENGTH + PROMPT) // 2
        self._span[PROMPT - 1 : middle], self._span[middle:] = first, first + 1

    def num_samples(self, epoch: int) -> int:
        """Return how many documents there are."""
        return len(self.documents)

    def pack_index_sha256(self, epoch: int) -> str:
        """Return a constant: the order is that of the documents."""
        return "0" * 64

    def fill_ratio(self, epoch: int) -> float:
        """Return 1: no position is padding."""
        return 1.0

    def describe(self, epoch: int, index: int) -> str:
        """Name a document."""
        return f"document {index}"

    def sample(self, epoch: int, index: int) -> Sample:
        """Return a document as a sample."""
        tokens = self.documents[index]
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "span_id": self._span,
            "loss_mask": (self._span > 0).float(),
            "position_ids": torch.arange(LENGTH),
            "doc_id": torch.zeros(LENGTH, dtype=torch.int64),
            **{name: field[index] for name, field in self.fields.items()},
        }


def engine_for(recipe: TrainRecipe, sources: Mapping[str, Documents], layout: Layout, seed: int) -> Engine:
    """Build a model from a seed, and the engine that trains it on these kinds of samples."""
    model = build_model(recipe.architecture, dtype=torch.float32, device=layout.device, seed=seed)
    shares = mix_of(recipe).shares
    data = TrainingData(
        {kind: DataPart(source, source, shares[kind], {}) for kind, source in sources.items()}
    )
    return Engine(model, recipe, data, layout, seed=seed, config_hash="")


def train_teacher(language: Language, layout: Layout, steps: int, seed: int = 77) -> VPGPTModel:
    """Train a teacher: four times as wide, twice as deep, on documents that no student sees."""
    recipe = recipe_for(TEACHER, steps, 2e-3)
    engine = engine_for(
        recipe,
        {CONVERSATIONS: Documents(language.documents(steps * BATCH, seed), CONVERSATIONS)},
        layout,
        seed,
    )
    for _ in range(steps):
        engine.step()
    engine.close()
    return engine.model.eval()


@torch.no_grad()
def log_probabilities(model: VPGPTModel, documents: Tensor) -> Tensor:
    """Return a model's log-probabilities `[B, LENGTH, V]` of documents `[B, LENGTH + 1]`, on its device."""
    tokens = documents[:, :-1].to(model.head_weight.device)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
    return model(tokens, positions, torch.zeros_like(tokens)).float().log_softmax(dim=-1)


@torch.no_grad()
def score(
    teacher: VPGPTModel, documents: NDArray[np.int64], topk: int, draws: int, seed: int
) -> dict[str, Tensor]:
    """Return the fields of scored samples `[N, LENGTH, ...]`: top-K, tail, draws from it, and the label."""
    torch.manual_seed(seed)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(documents), 4 * BATCH):
        part = torch.from_numpy(documents[start : start + 4 * BATCH])
        logprobs = log_probabilities(teacher, part)
        kept, ids = logprobs.topk(topk, dim=-1)
        tail = logprobs.exp().scatter(-1, ids, 0.0)
        drawn = torch.multinomial(tail.flatten(0, 1), draws, replacement=True)
        label = logprobs.gather(-1, part[:, 1:, None].to(logprobs.device)).squeeze(-1)
        fields = {
            "teacher_ids": ids,
            "teacher_logprobs": kept,
            "teacher_tail": tail.sum(dim=-1),
            "teacher_draws": drawn.view(*ids.shape[:2], draws),
            "teacher_label_logprob": label,
        }
        for name, values in fields.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


@torch.no_grad()
def compare(student: VPGPTModel, teacher: VPGPTModel, documents: NDArray[np.int64]) -> dict[str, float]:
    """Measure a student on held-out documents, over what follows the prompts.

    Returns:
        `nll` and `teacher_nll` in nats a token, `forward_kl`, the whole KL(teacher || student), and
        `reverse_kl`, KL(student || teacher), on the same contexts.
    """
    student.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(documents), 4 * BATCH):
        part = torch.from_numpy(documents[start : start + 4 * BATCH])
        ours, theirs = (log_probabilities(model, part)[:, PROMPT - 1 :] for model in (student, teacher))
        labels = part[:, PROMPT:, None].to(ours.device)
        sums += torch.stack(
            [
                -ours.gather(-1, labels).double().sum(),
                -theirs.gather(-1, labels).double().sum(),
                (theirs.exp() * (theirs - ours)).double().sum(),
                (ours.exp() * (ours - theirs)).double().sum(),
            ]
        ).cpu()
    count = documents[:, PROMPT:].size
    return dict(zip(("nll", "teacher_nll", "forward_kl", "reverse_kl"), (sums / count).tolist(), strict=True))
