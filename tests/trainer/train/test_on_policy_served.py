"""On-policy runs with a served teacher that never says the same twice: what it said holds after a kill."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ranks import Ranks, run_ranks
from tests.trainer.teacher.serving import MODEL, Served, serving
from tests.trainer.train.on_policy_jobs import SEQ_LEN, VOCAB, on_policy_job, on_policy_recipe, write_harmony
from tests.trainer.train.served_work import train_served, train_served_holding_step
from tests.trainer.train.train_jobs import summary
from tests.trainer.train.train_work import losses, payload_bytes, wait_for, wait_until
from trainer.checkpoints.tokenizers import RANKS_SHA256
from trainer.contract.schema.job import Job
from trainer.contract.status import EXIT_DONE, EXIT_FAILED
from trainer.data.indexed import SpanDocuments
from trainer.rollouts.storage import read_round

JITTER = 1e-3
"""Nats, far below what a self-test lets pass."""
Tokens = tuple[int, ...]


class Moody(Served):
    """Adds other noise to every answer; afterwards it can say again what it said first.

    Attributes:
        answered: What was said of each prompt, time after time, label log-probabilities [n].
        down: Answers to no prompt of a rollout that it has not answered before.
        repeats: Says what it said first, where it has said something.
    """

    def __init__(self, module: Any, conversations: list[Tokens]) -> None:
        super().__init__(module)
        self.conversations = conversations
        self.answered: dict[Tokens, list[np.ndarray]] = {}
        self.calls = 0
        self.down = self.repeats = False

    def tests(self, prompt: Tokens) -> bool:
        """Whether a prompt is one of a self-test, which asks of stored conversations."""
        return any(whole[: len(prompt)] == prompt for whole in self.conversations)

    def rollouts(self) -> dict[Tokens, int]:
        """How often each rollout was answered."""
        return {prompt: len(said) for prompt, said in self.answered.items() if not self.tests(prompt)}

    def fault(self, body: dict[str, Any]) -> str:
        return "503" if self.down and not all(self.tests(tuple(one)) for one in body["prompt"]) else ""

    def choice(self, index: int, tokens: list[int], body: dict[str, Any]) -> dict[str, Any]:
        assert body["prompt_logprobs"] == 0
        self.calls += 1
        before = self.answered.setdefault(tuple(tokens), [])
        if self.repeats and before:
            said = before[0]
        else:
            with torch.no_grad():
                logits = self.module(torch.tensor([tokens])).logits[0, :-1]
            labels = torch.tensor(tokens[1:])
            said = (logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)).double().numpy()
            said = said + np.random.default_rng(self.calls).normal(0, JITTER, size=len(said))
        before.append(said)
        entries = [
            {str(token): {"logprob": float(one), "rank": 1, "decoded_token": "x"}}
            for token, one in zip(tokens[1:], said, strict=True)
        ]
        return {
            "index": index,
            "text": "x",
            "finish_reason": "length",
            "logprobs": None,
            "prompt_logprobs": [None, *entries],
            "prompt_token_ids": list(tokens),
        }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_harmony(tmp_path_factory.mktemp("synth_kd_v1"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The payload of a served teacher."""
    directory = tmp_path_factory.mktemp("teacher")
    said = {"model": MODEL, "revision": "1a2b3c", "reasoning_mode": "high", "tokenizer_sha256": RANKS_SHA256}
    document = {"schema": "vpmoe.teacher/1", "kind": "server", **said}
    (directory / "teacher.json").write_text(json.dumps(document))
    return directory


@pytest.fixture
def served(data):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.7,
    )
    documents = SpanDocuments(data, "train")
    conversations = [tuple(documents[number].tokens.tolist()) for number in range(len(documents))]
    with serving(Moody(LlamaForCausalLM(config).eval(), conversations)) as one:
        yield one


def journal(job: Job) -> bytes:
    return (Path(job.work_dir) / "teacher" / "journal.rank_00000.jsonl").read_bytes()


def rounds(job: Job) -> dict[int, bytes]:
    """The files of the rounds that a run was trained on."""
    paths = sorted((Path(job.work_dir) / "rollouts").iterdir())
    return {number: path.read_bytes() for number, path in enumerate(paths, start=1)}


def test_what_a_served_teacher_said_before_a_kill_is_what_the_run_ends_with(tmp_path, data, teacher, served):
    recipe = on_policy_recipe(steps=4, **{"training.save_interval": 1})
    job = on_policy_job(tmp_path, data, teacher, recipe=recipe)
    said = tmp_path / "said"
    victim = Ranks(1, train_served_holding_step, job, served.url, 2, said)
    wait_for(said)
    # The round that is under way is answered too: three rounds of four rollouts.
    wait_until(lambda: journal(job).count(b"\n") == 12, "12 answers in the journal")
    victim.kill()
    kept, files, lost = journal(job), rounds(job), losses(job)
    first = served.rollouts()
    assert (len(files), len(lost)) == (2, 1)  # the second step ends, and is not logged yet
    assert set(first.values()) == {1}
    assert len(first) == 12

    served.down = True
    assert run_ranks(1, train_served, job, served.url) == [EXIT_FAILED]
    status = (Path(job.work_dir) / "STATUS").read_text()
    assert "no answer from the teacher after 2 attempts" in status
    assert "HTTP 503; see that VPMOE_TEACHER_URL names servers that are up" in status
    assert len(status.splitlines()) == 1
    assert not list(Path(job.output_dir).glob("*"))
    assert journal(job) == kept
    assert served.rollouts() == first
    assert {number: content for number, content in rounds(job).items() if number in files} == files
    assert losses(job)[:1] == lost

    served.down = False
    assert run_ranks(1, train_served, job, served.url, True) == [EXIT_DONE]
    found = summary(job)
    assert found["resumed_from"] == 3
    # The check repeats steps that were taken and saved while attempts failed.
    assert (found["resume_drift"], found["resume_check"]["state_equal"]) == (0.0, True)
    assert journal(job).startswith(kept)
    assert Counter(served.rollouts().values()) == {1: 16}  # none was asked again, not by the check either
    assert losses(job)[:1] == lost
    assert {number: content for number, content in rounds(job).items() if number in files} == files
    told = np.concatenate([one[0] for prompt, one in served.answered.items() if not served.tests(prompt)])
    used = [read_round(content)[1]["teacher_logprob"] for content in rounds(job).values()]
    assert np.isin(np.concatenate(used), told.astype(np.float32)).all()

    # What it said makes the run: nothing disturbs this one, and it hears the same.
    served.repeats = True
    straight = on_policy_job(tmp_path, data, teacher, recipe=recipe, name="straight")
    assert run_ranks(1, train_served, straight, served.url) == [EXIT_DONE]
    assert Counter(served.rollouts().values()) == {2: 16}
    assert rounds(straight) == rounds(job)
    assert losses(straight) == losses(job)
    assert payload_bytes(straight) == payload_bytes(job)
