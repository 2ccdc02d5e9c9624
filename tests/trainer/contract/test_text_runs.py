"""Long runs of white space: what is encoded around them has the ids that the pattern gives."""

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.contract.text_runs import is_panic, segments
from trainer.errors import EvaluationError
from vpmoe_assets.harmony import tokenizer
from vpmoe_assets.harmony.tokenizer import TextError, load_text_encoding, load_tiktoken, text_encoder

CHARACTERS = " \t\u00a0\u3000\u2028\x85\n\r\x1cab1!/Aé'"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("o200k")
    tokenizer.write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def pattern(directory):
    """The o200k pattern, by an engine that has no such limit and that nobody here wrote."""
    return regex.compile(load_text_encoding(directory)._pat_str)


TEXTS = st.lists(
    st.tuples(st.sampled_from(CHARACTERS), st.integers(1, 6)).map(lambda pair: pair[0] * pair[1]), max_size=12
).map("".join)


@given(text=TEXTS, longest=st.integers(2, 6))
def test_every_segment_is_whole_pieces_of_the_pattern(pattern, text, longest):
    pieces, found = pattern.findall(text), []
    for part, one_piece in segments(text, longest):
        found += [part] if one_piece else pattern.findall(part)
    assert found == pieces


@pytest.mark.parametrize("after", ["", "y", "\nz"])
def test_a_run_that_is_too_long_for_the_pattern_is_encoded(directory, after):
    encoding, text = load_tiktoken(directory), f"x{'\u00a0\t' * 500_050}{after}"
    if after != "\nz":  # before a line break tiktoken goes through
        with pytest.raises(ValueError, match="stack size"):
            encoding.encode_to_numpy(text, disallowed_special=())
    assert encoding.decode(text_encoder(directory)(text).tolist()) == text


def test_a_run_just_below_the_limit_has_the_ids_of_tiktoken(directory):
    encoding = load_text_encoding(directory)
    text = "a\n" + " " * 150_000 + "b"
    assert text_encoder(directory)(text).tolist() == encoding.encode_ordinary(text)


def test_what_has_no_encoding_is_refused_and_a_panic_is_an_error(directory, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 calls it."""

    with pytest.raises(TextError, match="not valid Unicode"):
        text_encoder(directory)("a \ud800 b")

    class Panicking:
        def encode_to_numpy(self, text, **_):
            raise PanicException("a stack of a million")

    monkeypatch.setattr(tokenizer, "load_text_encoding", lambda _: Panicking())
    with pytest.raises(TextError, match="of 5 characters makes tiktoken panic"):
        text_encoder(directory)("hello")
    assert is_panic(PanicException())
    assert not is_panic(KeyboardInterrupt())


def test_the_trainers_tokenizer_takes_the_same_texts_and_refuses_the_same(directory):
    theirs, ours = O200kTokenizer(directory), text_encoder(directory)
    wide = "x" + " " * 1_000_100 + "y"
    assert theirs.encode_many(["a", wide])[1] == ours(wide).tolist()
    with pytest.raises(EvaluationError, match=r"the text 'a \\ud800' is not valid Unicode"):
        theirs.encode_many(["a \ud800"])
    with pytest.raises(EvaluationError, match="not valid Unicode"):
        theirs.encode("a \ud800")
