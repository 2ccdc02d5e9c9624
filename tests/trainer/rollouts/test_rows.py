"""Rollouts in rows, their spans, and their bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.rollouts.cases import EOD, MIDDLE, STOP, TinyForm, rollout
from trainer.decoding.conversation import ANALYSIS, ASSISTANT, CHANNEL, END, FINAL, MESSAGE, RETURN, START
from trainer.errors import DataError
from trainer.rollouts.forms import HarmonyForm
from trainer.rollouts.history import History
from trainer.rollouts.pack import pack_row
from trainer.rollouts.storage import buffer_bytes, read_buffer, read_round, round_bytes

FORM = HarmonyForm()
REASONED = [CHANNEL, ANALYSIS, MESSAGE, 11, 12, END]
ANSWERED = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, 13, RETURN]


@pytest.mark.parametrize(
    ("ids", "final", "valid"),
    [
        pytest.param([*REASONED, *ANSWERED], 7, True, id="well-formed"),
        pytest.param([*REASONED, *ANSWERED[:-1]], 6, False, id="cut in the answer"),
        pytest.param(REASONED[:4], 0, False, id="cut in the reasoning"),
        pytest.param([CHANNEL, FINAL, MESSAGE, 13, RETURN], 0, False, id="no reasoning"),
        pytest.param([*REASONED, 5, 6, 7], 3, False, id="no header of the answer"),
        pytest.param([*REASONED[:4], START, 9], 0, False, id="a control token in the reasoning"),
    ],
)
def test_each_sampled_token_belongs_to_the_message_that_was_being_read(ids, final, valid):
    spans = FORM.spans(ids)
    assert spans.tolist() == [6] * (len(ids) - final) + [7] * final
    assert FORM.valid(ids) is valid
    control = [token in (CHANNEL, MESSAGE, END, START, RETURN) for token in ids]
    assert FORM.control(np.array(ids, dtype=np.int32)).tolist() == control


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_row_says_of_each_position_what_a_loop_over_its_tokens_says(sizes, topk, mask):
    rollouts = [rollout(n + 1, 0, prompt, answer, topk=topk) for n, (prompt, answer) in enumerate(sizes)]
    rollouts[0].ids[-1] = STOP
    rollouts[0].ids[0] = MIDDLE
    length = sum(map(sum, sizes)) + 3
    row = pack_row(rollouts, seq_len=length, eod=EOD, form=TinyForm(), topk=topk, mask_control=mask)
    at = 0
    for number, one in enumerate(rollouts):
        tokens, asked = one.tokens.tolist(), len(one.request.prompt)
        spans = TinyForm().spans(one.ids.tolist())
        for place, token in enumerate(tokens):
            assert row["tokens"][at] == token
            assert (row["position_ids"][at], row["doc_id"][at]) == (place, number)
            sampled = place + 1 - asked  # of the token that this position foretells
            trains = 0 <= sampled < len(one.ids)
            assert row["loss_mask"][at] == trains
            assert row["span_id"][at] == (spans[sampled] if trains else 0)
            if trains:
                assert row["labels"][at] == one.ids[sampled]
                assert row["teacher_label_logprob"][at] == one.score.logprob[sampled]
                assert row["behaviour_logprob"][at] == one.behaviour[sampled]
                assert row["excluded"][at] == (mask and one.ids[sampled] >= MIDDLE)
                if topk:
                    assert np.array_equal(row["teacher_ids"][at], one.score.ids[sampled])
                    assert np.array_equal(row["teacher_logprobs"][at], one.score.logprobs[sampled])
                    assert row["teacher_tail"][at] == one.score.tail[sampled]
            at += 1
    for name, filler in (("tokens", EOD), ("labels", EOD), ("loss_mask", 0), ("span_id", 0), ("doc_id", -1)):
        assert (row[name][at:] == filler).all()
    assert row["loss_mask"].sum() == sum(answer for _, answer in sizes)
    assert ("teacher_ids" in row) == bool(topk)


def test_what_does_not_fit_or_has_no_score_is_no_row():
    keys = {"eod": EOD, "form": TinyForm(), "topk": 0, "mask_control": False}
    with pytest.raises(ValueError, match="2 rollouts of 14 tokens do not fit a row of 13"):
        pack_row([rollout(), rollout(2)], seq_len=13, **keys)
    with pytest.raises(ValueError, match="round 1 has no score"):
        pack_row([rollout(scored=False)], seq_len=13, **keys)


def same(ours, theirs):
    assert (ours.number, ours.born, ours.stopped) == (theirs.number, theirs.born, theirs.stopped)
    names = ("epoch", "document", "sample", "mode")
    assert [getattr(ours.request, name) for name in names] == [
        getattr(theirs.request, name) for name in names
    ]
    pairs = [(ours.request.prompt, theirs.request.prompt), (ours.ids, theirs.ids)]
    pairs.append((ours.behaviour, theirs.behaviour))
    assert (ours.score is None) == (theirs.score is None)
    if ours.score is not None and theirs.score is not None:
        pairs += [(getattr(ours.score, name), getattr(theirs.score, name)) for name in vars(ours.score)]
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        assert np.array_equal(mine, other)


@pytest.mark.parametrize("topk", [0, 3])
def test_a_buffer_comes_back_as_it_was_with_finished_and_unfinished_rounds(topk):
    pool = [rollout(1, 0, document=place, answer=place + 1, topk=topk) for place in range(3)]
    rounds = {
        3: tuple(rollout(3, 1, document=place, scored=False, mode="high") for place in range(2)),
        2: tuple(rollout(2, 0, document=place, topk=topk) for place in range(2)),
    }
    content = buffer_bytes(pool, rounds, {"place": 5})
    assert content == buffer_bytes(pool, dict(sorted(rounds.items())), {"place": 5})
    found, under_way, state = read_buffer(content)
    assert state == {"place": 5}
    assert sorted(under_way) == [2, 3]
    for ours, theirs in zip(
        [*found, *under_way[2], *under_way[3]], [*pool, *rounds[2], *rounds[3]], strict=True
    ):
        same(ours, theirs)
    assert read_buffer(buffer_bytes([], {}, {})) == ([], {}, {})
    with pytest.raises(DataError, match="a buffer of rollouts cannot be read"):
        read_buffer(content[:-5])
    with pytest.raises(DataError, match=r"schema 'vpmoe\.rollouts/1'"):
        read_buffer(round_bytes(1, pool))


def test_a_round_is_kept_in_twelve_bytes_a_token_and_its_history_can_be_told(tmp_path):
    rounds = [[rollout(n, n - 1, document=place, answer=400) for place in range(4)] for n in (1, 2, 3)]
    contents = [round_bytes(number, made) for number, made in enumerate(rounds, 1)]
    assert len(contents[0]) < 12 * 1600 + 2000
    header, arrays = read_round(contents[1])
    assert (header["round"], header["born"]) == (2, 1)
    assert arrays["documents"].tolist() == [0, 1, 2, 3]
    assert np.array_equal(arrays["ids"], np.concatenate([one.ids for one in rounds[1]]))

    kept, reckoned = History(tmp_path / "rollouts"), History(None)
    marks = []
    for number, content in enumerate(contents, 1):
        kept.add(number, content)
        reckoned.add(number, content)
        marks.append(kept.sha256)
    assert kept.sha256 == reckoned.sha256
    assert len(set(marks)) == 3
    (tmp_path / "rollouts" / ".round_0000004.safetensors.7.tmp").touch()  # of a write that was cut short
    kept.go_on(2, marks[1])
    kept.add(3, contents[2])
    assert kept.sha256 == marks[2]
    assert [path.name for path in sorted((tmp_path / "rollouts").iterdir())] == [
        f"round_000000{number}.safetensors" for number in (1, 2, 3)
    ]
    (tmp_path / "rollouts" / "round_0000001.safetensors").unlink()
    with pytest.raises(DataError, match=r"round_0000001.safetensors is missing .1 of the 3 rounds"):
        kept.go_on(3, marks[2])
    kept.go_on(0)
    assert not list((tmp_path / "rollouts").iterdir())
