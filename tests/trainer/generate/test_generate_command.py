"""`python -m trainer generate`: output, seeds, streaming, and what it refuses."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.evaluate.evaluation_inputs import architecture, write_llama, write_ranks
from trainer.__main__ import main
from trainer.checkpoints.published import save_published
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.schema.experiment import load_experiment
from trainer.decoding.conversation import conversation_prompt
from trainer.decoding.generation import generate
from trainer.generate.command import TextStream
from trainer.model.gpt import build_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return write_ranks(tmp_path_factory.mktemp("o200k"))


@pytest.fixture(scope="module")
def tokenizer(ranks):
    return O200kTokenizer(ranks)


@pytest.fixture(scope="module")
def model():
    made = build_model(architecture(layers=4), seed=3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("student") / "payload"
    save_published(model, architecture(layers=4), directory)
    return directory


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def run_json(capsys, *arguments: object) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_what_the_library_generates(checkpoint, ranks, tokenizer, model, capsys):
    found = run_json(
        capsys, "--checkpoint", checkpoint, "--tokenizer", ranks, "--prompt", "The sea", "--max-new-tokens", 7
    )
    prompt = tokenizer.encode("The sea")
    (expected,) = generate(model, [prompt], max_new_tokens=7, stop=(199_999, 200_002, 200_012))
    (one,) = found["sequences"]
    assert one["ids"] == list(expected.ids)
    assert one["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert one["text"] == tokenizer.decode(expected.ids)
    assert (one["prompt"], one["prompt_ids"], one["seed"]) == ("The sea", prompt, None)


def test_a_conversation_uses_the_experiments_scaffold(checkpoint, ranks, tokenizer, capsys, monkeypatch):
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    given_ = ("--checkpoint", checkpoint, "--tokenizer", ranks, "--conversation", "--prompt", "2+2?")
    scaffold = load_experiment("smoke").data.synth_harmony
    for flags, effort in (((), None), (("--effort", "low"), "low")):
        found = run_json(capsys, *given_, "--max-new-tokens", 2, *flags)
        expected = conversation_prompt(tokenizer, scaffold, "2+2?", effort=effort)
        assert found["sequences"][0]["prompt_ids"] == expected


def test_samples_differ_from_one_another_and_not_between_runs(checkpoint, ranks, capsys):
    given_ = (
        "--checkpoint",
        checkpoint,
        "--tokenizer",
        ranks,
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--samples",
        2,
    )
    settings_ = ("--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 6, "--seed", 5)
    first, second = (run_json(capsys, *given_, *settings_) for _ in range(2))
    assert first == second
    assert [one["seed"] for one in first["sequences"]] == [5, 6, 5, 6]
    assert len({tuple(one["ids"]) for one in first["sequences"]}) == 4
    other = run_json(capsys, *given_, *settings_[:-1], 9)
    assert other["sequences"][0]["ids"] != first["sequences"][0]["ids"]


def test_a_hugging_face_directory_stops_at_its_own_eos_and_at_ids_given(llama_dir, capsys):
    given_ = ("--checkpoint", llama_dir, "--prompt", "rain on the sea", "--max-new-tokens", 8)
    (free,) = run_json(capsys, *given_)["sequences"]
    assert free["finish"] == "length"
    (stopped,) = run_json(capsys, *given_, "--bos", "--stop", free["ids"][2], "--stop", 3)["sequences"]
    assert stopped["prompt_ids"][1:] == free["prompt_ids"]
    (stopped,) = run_json(capsys, *given_, "--stop", free["ids"][2])["sequences"]
    assert stopped["finish"] == "stop"
    assert stopped["ids"] == free["ids"][: free["ids"].index(free["ids"][2]) + 1]


def test_text_is_written_plainly_and_as_it_is_made_on_a_terminal(
    checkpoint, ranks, tokenizer, capsys, monkeypatch
):
    given_ = ("--checkpoint", checkpoint, "--tokenizer", ranks, "--prompt", "The sea", "--max-new-tokens", 12)
    text = run_json(capsys, *given_)["sequences"][0]["text"]
    assert run(*given_) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "12 tokens in" in captured.err
    assert "0 of 1 ended with a stop id, 1 at --max-new-tokens" in captured.err

    class Terminal(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed: list[int] = []

        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            self.flushed.append(len(self.getvalue()))

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(*given_) == 0
    assert terminal.getvalue() == text + "\n"
    assert len(set(terminal.flushed)) > 6


def test_a_prompt_can_come_from_stdin(checkpoint, ranks, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    found = run_json(
        capsys, "--checkpoint", checkpoint, "--tokenizer", ranks, "--prompt", "-", "--max-new-tokens", 1
    )
    assert found["sequences"][0]["prompt_ids"] == tokenizer.encode("from a pipe")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    arguments = ["generate", "--checkpoint", str(checkpoint), "--tokenizer", str(ranks), "--prompt", "-"]
    assert main(arguments) == 1
    assert "--prompt -: standard input is not utf-8 (byte 3)" in capsys.readouterr().err


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30) | st.text(st.sampled_from("aé你👩🏳️‍🌈😀ﬁ\u0301 "), max_size=20))
def test_streamed_pieces_are_the_text_and_never_half_a_character(tokenizer, text):
    ids = [token for byte in text.encode() for token in _byte_tokens(tokenizer)[byte]]  # every byte alone
    for cut in (ids, tokenizer.encode(text)):
        stream = TextStream(tokenizer.decode)
        pieces = [stream.add(token) for token in cut]
        assert "".join(pieces) + stream.rest() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
            assert stream.rest() == ""


def _byte_tokens(tokenizer, table={}):  # noqa: B006 - kept on purpose: made once
    if not table:
        table |= {token[0]: [number] for number, token in tokenizer.ordinary() if len(token) == 1}
    return table


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 199_997) | st.integers(0, 255), max_size=12))
def test_streamed_pieces_of_any_ids_are_their_text(tokenizer, ids):
    stream = TextStream(tokenizer.decode)
    assert "".join(stream.add(token) for token in ids) + stream.rest() == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "2000"], "more than the 1024 that the model can read"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--samples", "3"], "at temperature 0 would give equal texts"),
        (["--samples", "0"], "at least 1"),
        (["--top-p", "0.5"], "no effect at temperature 0"),
        (["--effort", "low"], "add --conversation"),
        (["--conversation", "--bos"], "a beginning of its own"),
        (["--stop", "300000"], "stop id 300000"),
        (["--conversation", "--experiment", "nowhere"], "nowhere"),
        (["--prompt", "-", "--prompt", "-"], "can be given once"),
        (["--temperature", "1", "--seed", "-5"], "seed = -5"),
        (["--backend", "fusde"], "--backend: found 'fusde'"),
        (["--backend", "fused", "--dtype", "bf16"], "set training.backend = 'reference'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(checkpoint, ranks, capsys, flags, message):
    assert run("--checkpoint", checkpoint, "--tokenizer", ranks, "--prompt", "a", *flags) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_checkpoints_and_tokenizers_that_do_not_fit_are_refused(
    checkpoint, llama_dir, ranks, tmp_path, capsys
):
    for arguments, message in (
        (["--checkpoint", tmp_path], "holds no config.json"),
        (["--checkpoint", checkpoint], "--tokenizer is missing"),
        (["--checkpoint", checkpoint, "--tokenizer", tmp_path], "no tokenizer file"),
        (["--checkpoint", llama_dir, "--tokenizer", ranks], "brings its own"),
        (["--checkpoint", llama_dir, "--conversation"], "no Harmony control tokens"),
    ):
        assert run(*arguments, "--prompt", "a") == 1
        assert message in capsys.readouterr().err
    assert run("--checkpoint", llama_dir, "--prompt", "") == 1
    assert "--prompt is empty" in capsys.readouterr().err


def test_an_interrupt_ends_it_quietly(checkpoint, ranks, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.decoding.generation.generate", interrupted)
    assert run("--checkpoint", checkpoint, "--tokenizer", ranks, "--prompt", "a") == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from trainer.__main__ import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "assert not {'torch', 'megatron', 'pydantic', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--conversation --prompt" in done.stdout
    assert "exit codes:" in done.stdout
