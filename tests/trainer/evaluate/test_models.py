"""Both kinds of checkpoint behind one interface, and what is refused when one is opened."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.evaluate.evaluation_inputs import (
    architecture,
    plain_logprobs,
    write_llama,
    write_tokenizer,
)
from tests.trainer.other_backend import add_backend
from trainer.checkpoints.format import PublishedError
from trainer.checkpoints.tokenizers import HuggingFaceTokenizer, O200kTokenizer
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.evaluate import HuggingFaceCheckpoint, MegatronCheckpoint
from trainer.errors import EvaluationError
from trainer.evaluate.opening import is_checkpoint, open_model

TOKENS = torch.arange(40).reshape(2, 20) * 5 % 257
LENGTHS = torch.tensor([20, 13])


def tree():
    """A prefix of 5 tokens with continuations of 3, 0 and 9 tokens, and padding."""
    prefix, first, third = TOKENS[0, :5], TOKENS[0, 5:8], TOKENS[1, :9]
    row = torch.cat((prefix, first, third, torch.zeros(3, dtype=torch.int64)))
    positions = torch.cat((torch.arange(8), torch.arange(5, 14), torch.zeros(3, dtype=torch.int64)))
    branch = torch.tensor([0] * 5 + [1] * 3 + [3] * 9 + [-1] * 3)
    alone = torch.cat((torch.arange(2, 7), torch.zeros(15, dtype=torch.int64)))
    rows = torch.stack((row, alone))
    return (
        rows,
        torch.stack((positions, torch.arange(20))),
        torch.stack((branch, torch.tensor([0] * 4 + [2] + [-1] * 15))),
        [torch.cat((prefix, first)), torch.cat((prefix, third))],
    )


def test_logits_are_those_of_transformers_also_in_a_padded_batch(llama):
    ours = llama.logits(TOKENS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        with torch.no_grad():
            theirs = llama.module(TOKENS[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(ours[row, :length], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(llama.next_logits(TOKENS, LENGTHS)[1], ours[1, 12])


def test_logits_of_a_published_checkpoint_are_those_of_its_model(student):
    tokens = TOKENS * 700
    ours = student.logits(tokens, LENGTHS)
    places = torch.arange(20)[None].expand(2, 20).contiguous()
    with torch.no_grad():
        theirs = student.module(tokens, places, torch.zeros_like(places))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1, :13], theirs[1, :13], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "student"])
def test_continuations_that_share_a_prefix_do_not_see_each_other(kind, request):
    model = request.getfixturevalue(kind)
    assert model.shares_prefixes
    rows, positions, branch, sequences = tree()
    hidden = model.hidden_trees(rows, positions, branch)
    for sequence, places in zip(sequences, (range(8), [*range(5), *range(8, 17)]), strict=True):
        alone = model.hidden(sequence[None], torch.tensor([len(sequence)]))[0]
        torch.testing.assert_close(hidden[0, list(places)], alone, rtol=1e-4, atol=1e-5)
    alone = model.hidden(rows[1:, :5], torch.tensor([5]))[0]
    torch.testing.assert_close(hidden[1, :5], alone, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_chunk(llama, monkeypatch):
    hidden, targets = llama.hidden(TOKENS[:1], LENGTHS[:1])[0], TOKENS[0].roll(-1)
    whole = llama.score(hidden, targets)
    monkeypatch.setattr("trainer.evaluate.models._CHUNK_LOGITS", {"cpu": 3 * llama.vocab_size})
    chunked = llama.score(hidden, targets)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(chunked[1], whole[1])
    logprobs, greedy = plain_logprobs(llama.module, TOKENS[0].tolist())
    torch.testing.assert_close(whole[0][:-1], torch.from_numpy(logprobs), rtol=1e-5, atol=1e-5)
    assert whole[1][:-1].tolist() == greedy.tolist()


def test_a_checkpoint_whose_config_differs_from_the_experiments_is_refused(llama_dir, student_dir, ranks):
    wrong = HuggingFaceCheckpoint(geometry={"hidden_size": 64, "rope_theta": 10000.0})
    with pytest.raises(EvaluationError, match=r"hidden_size: 32 found, 64 expected$"):
        open_model(llama_dir, name="llama", expected=wrong)
    right = HuggingFaceCheckpoint(geometry={"hidden_size": 32, "model_type": "llama"})
    assert open_model(llama_dir, name="llama", expected=right).kind == "huggingface"
    other = MegatronCheckpoint(architecture=architecture(layers=8))
    with pytest.raises(PublishedError, match=r"model.num_layers: 4 stored, 8 asked"):
        open_model(student_dir, name="student", expected=other, tokenizer=ranks)


def test_a_checkpoint_of_the_other_kind_is_refused(llama_dir, student_dir, ranks):
    with pytest.raises(EvaluationError, match="a Hugging Face checkpoint is expected"):
        open_model(student_dir, name="x", expected=HuggingFaceCheckpoint(), tokenizer=ranks)
    with pytest.raises(EvaluationError, match="one of our published checkpoints is expected"):
        open_model(llama_dir, name="x", expected=MegatronCheckpoint())


def test_a_missing_tensor_is_refused_and_not_drawn_at_random(llama_dir, tmp_path):
    copy = shutil.copytree(llama_dir, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"fill its architecture exactly.*layers\.1\.mlp\.up_proj"):
        open_model(copy, name="copy")


def test_a_checkpoint_with_a_file_that_is_cut_off_is_refused_by_name(llama_dir, tmp_path):
    copy = shutil.copytree(llama_dir, tmp_path / "copy")
    for name in ("tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-50])
        with pytest.raises(EvaluationError, match=r"copy.*(cannot be loaded|cannot be read).*restore it"):
            open_model(copy, name="copy")
        (copy / name).write_bytes(content)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path, student_dir):
    with pytest.raises(EvaluationError, match=r"holds no config.json"):
        open_model(tmp_path, name="nothing")
    (tmp_path / "config.json").write_text(json.dumps({"schema": "vpmoe.checkpoint/9"}))
    with pytest.raises(EvaluationError, match="neither schema"):
        open_model(tmp_path, name="nothing")
    with pytest.raises(EvaluationError, match="o200k_tokenizer"):
        open_model(student_dir, name="student")
    assert is_checkpoint(student_dir)
    assert not is_checkpoint(tmp_path)


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    size = write_tokenizer(tmp_path)
    config = CohereConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=0.25,
        initializer_range=0.5,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="more to its logits"):
        open_model(tmp_path, name="scaled")


def test_o200k_encodes_as_it_should(ranks):
    tokenizer = O200kTokenizer(ranks)
    assert tokenizer.encode("1.2345e-10") == [16, 13, 20771, 20, 68, 12, 702]
    assert tokenizer.bos == 199_998
    assert tokenizer.special["<|return|>"] == 200_002
    assert 200_007 not in tokenizer.encode("text <|end|>")
    assert tokenizer.decode(tokenizer.encode("naïve 你好 👩‍🚀")) == "naïve 你好 👩‍🚀"


def test_a_damaged_rank_file_is_refused_and_left_alone(ranks, tmp_path):
    damaged = tmp_path / "o200k_base.tiktoken"
    damaged.write_bytes((ranks / "o200k_base.tiktoken").read_bytes().replace(b"IQ== 0", b"IQ== 1"))
    before = damaged.read_bytes()
    with pytest.raises(EvaluationError, match="sha256 is"):
        O200kTokenizer(tmp_path)
    assert damaged.read_bytes() == before


def test_fingerprints_tell_tokenizers_apart_and_not_their_files(tmp_path):
    for name in ("one", "same", "other", "split"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, words=("in", "er") if name == "other" else ("in", "x d"))
    spec = json.loads((tmp_path / "same" / "tokenizer.json").read_text())
    (tmp_path / "same" / "tokenizer.json").write_text(json.dumps(spec, indent=3))
    spec["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "split" / "tokenizer.json").write_text(json.dumps(spec))
    marks = {name: HuggingFaceTokenizer(tmp_path / name).fingerprint for name in ("one", "same", "other")}
    assert marks["one"] == marks["same"] != marks["other"]
    assert HuggingFaceTokenizer(tmp_path / "split").fingerprint != marks["one"]


def test_the_o200k_files_of_a_hugging_face_rung_have_the_fingerprint_of_the_ranks(ranks, tmp_path):
    from vpmoe_assets.donors.tokenizers import o200k_tokenizer_config, o200k_tokenizer_json
    from vpmoe_assets.harmony.tokenizer import load_ranks

    (tmp_path / "tokenizer.json").write_bytes(o200k_tokenizer_json(load_ranks(ranks)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(o200k_tokenizer_config()))
    ours, theirs = O200kTokenizer(ranks), HuggingFaceTokenizer(tmp_path)
    assert theirs.fingerprint == ours.fingerprint
    assert theirs.bos == ours.bos == 199_998


@pytest.mark.parametrize(("bos", "expected"), [("<s>", "<s>"), (None, "</s>")])
def test_bos_is_the_tokenizers_own_or_else_its_eos(bos, expected, tmp_path):
    write_tokenizer(tmp_path, bos=bos)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.decode([tokenizer.bos]) == expected


def test_weights_may_be_evaluated_in_another_type(tmp_path):
    directory = write_llama(tmp_path / "model")
    narrow = open_model(directory, name="narrow", dtype="bf16")
    wide = open_model(directory, name="wide", dtype="fp32")
    ours, theirs = narrow.logits(TOKENS, LENGTHS), wide.logits(TOKENS, LENGTHS)
    assert ours.dtype == torch.float32
    assert 0 < float((ours - theirs)[0].abs().max()) < 0.3 * float(theirs.std())


@pytest.mark.parametrize("fusion", ["grouped_gemm", "permute_fusion", "router_fusion"])
def test_a_checkpoint_is_measured_whatever_fusions_it_was_trained_with(
    fusion, student_dir, student, tmp_path, ranks
):
    flagged = tmp_path / "payload"
    shutil.copytree(student_dir, flagged)
    config = json.loads((flagged / "config.json").read_text())
    config["architecture"]["moe"][fusion] = True
    (flagged / "config.json").write_text(json.dumps(config))
    own = open_model(flagged, name="flagged", tokenizer=ranks)
    expected = MegatronCheckpoint(architecture=student.architecture)
    told = open_model(flagged, name="flagged", tokenizer=ranks, expected=expected)
    rows, lengths = torch.arange(12)[None], torch.tensor([12])
    assert torch.equal(own.logits(rows, lengths), student.logits(rows, lengths))
    assert torch.equal(told.logits(rows, lengths), student.logits(rows, lengths))


def test_our_checkpoints_take_a_backend(student_dir, ranks, group, tmp_path, monkeypatch):
    opened = open_model(
        student_dir, name="student", tokenizer=ranks, backend=add_backend(monkeypatch, tmp_path)
    )
    assert type(opened.module.moe_layers[0].experts).__name__ == "GatheredExperts"
    with pytest.raises(ConfigError, match=r"training\.backend: found 'turbo'; allowed: "):
        open_model(student_dir, name="student", tokenizer=ranks, backend="turbo")
