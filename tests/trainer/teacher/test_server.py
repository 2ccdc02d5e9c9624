"""A served teacher against the model that serves it, over real sockets, with all that goes wrong there."""

import logging
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.trainer.teacher.serving import DESCRIPTOR, KEY, MODEL, Served, serving
from tests.trainer.teacher.test_local_teachers import conversations, same
from trainer.errors import TeacherError
from trainer.teacher.descriptor import Descriptor, read_descriptor
from trainer.teacher.opening import open_teacher, teacher_identity
from trainer.teacher.server import Manners, ServerTeacher
from trainer.teacher.teacher import TailDraws
from vpmoe_assets.donors.teacher import silent

QUICK = Manners(
    attempts=4, connect_seconds=2.0, answer_seconds=20.0, first_pause=0.01, longest_pause=0.02, prompts=2
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def served(llama):
    with serving(Served(llama.model.module)) as one:
        yield one


@pytest.fixture
def teacher(served):
    with ServerTeacher(DESCRIPTOR, [served.url], key=KEY, manners=QUICK) as one:
        yield one


def dead_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("mass", [None, 0.5])
def test_a_server_says_what_its_model_says(style, mass, llama):
    sequences, wanted = conversations(count=3)
    wanted[1] = [3, 5, 6]
    sequences.append([1, 2, 3])
    wanted.append([])
    with (
        serving(Served(llama.model.module, style=style)) as served,
        ServerTeacher(DESCRIPTOR, [served.url], manners=QUICK) as teacher,
    ):
        theirs = teacher.score(sequences, wanted, 4, mass=mass)
        assert teacher.context == 199
    for one, other in zip(theirs, llama.score(sequences, wanted, 4, mass=mass), strict=True):
        same(one, other)
        assert np.array_equal(one.ids, other.ids)
        assert one.draws.shape == (len(one), 0)
    assert all(body["max_tokens"] == 1 for body in served.requests)
    assert served.requests[-1].get("echo") == (True if style == "echo" else None)


def test_without_listed_tokens_there_are_the_labels_alone(teacher, llama):
    sequences, wanted = conversations(count=2)
    for one, other in zip(
        teacher.score(sequences, wanted, 0), llama.score(sequences, wanted, 0), strict=True
    ):
        same(one, other)
        assert one.ids.shape == (len(one), 0)
        assert (one.tail_mass == 1).all()


@pytest.mark.parametrize("fault", ["500", "503", "429", "html", "half", "hang up", "stall"])
def test_a_passing_fault_costs_another_attempt_and_nothing_else(fault, served, llama):
    manners = replace(QUICK, answer_seconds=1.5 if fault == "stall" else 20.0, attempts=9)
    sequences, wanted = conversations(count=1)
    with ServerTeacher(DESCRIPTOR, [served.url], manners=manners) as teacher:
        served.faults = [fault] if fault == "stall" else [fault, fault]
        found = teacher.score(sequences, wanted, 3)
    same(found[0], llama.score(sequences, wanted, 3)[0])
    if fault == "stall":  # on a busy machine it may be late once more
        assert len(served.requests) >= 2
        return
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [("500", "HTTP 500"), ("html", r"no JSON \(text/html, 26 bytes\)"), ("hang up", "RemoteProtocolError")],
)
def test_a_lasting_fault_ends_it_with_its_name(fault, says, served, teacher):
    served.faults = [fault] * 9
    chance = random.getstate()
    with pytest.raises(TeacherError, match=rf"after 4 attempts, the last: {served.url}: .*{says}.*TINY_URLS"):
        teacher.score([[1, 2, 3]], [[0, 1]], 2)
    assert len(served.requests) == 4
    assert random.getstate() == chance  # a run's checkpoints hold it


def test_what_the_server_refuses_is_not_asked_again(served, teacher):
    served.faults = ["400"]
    with pytest.raises(TeacherError, match=r"refuses: HTTP 400.*no more than 5.*--max-logprobs 6"):
        teacher.score([[1, 2, 3]], [[0, 1]], 6)
    assert len(served.requests) == 1


def other_ids(document):
    document["choices"][0]["prompt_token_ids"][1] = 99


def other_tokens(document):
    choice = document["choices"][0]
    del choice["prompt_token_ids"]
    choice["prompt_logprobs"] = [None] + [{"250": {"logprob": -1.0}}] * (len(choice["prompt_logprobs"]) - 1)


def one_more(document):
    choice = document["choices"][0]
    del choice["prompt_token_ids"]
    choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"]]


def raw_logits(document):
    for entry in document["choices"][0]["prompt_logprobs"][1:]:
        for said in entry.values():
            said["logprob"] = 0.0


def fewer(document):
    for entry in document["choices"][0]["prompt_logprobs"][1:]:
        for name in list(entry)[2:]:
            del entry[name]


def not_finite(document):
    for entry in document["choices"][0]["prompt_logprobs"][1:]:
        for said in entry.values():
            said["logprob"] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_ids, r"not those that were sent: from token 1 on \[99, 3, 4\] for \[2, 3, 4\]"),
        (other_tokens, r"token 1 was sent as id 2, the answer speaks of ids 250"),
        (one_more, r"about 5 tokens, 4 were sent"),
        (raw_logits, r"have a probability of 3\.0+ together"),
        (fewer, r"tokens are listed at token 1, 3 were asked for: start the server with --max-logprobs 3"),
        (not_finite, r"log-probability of token 1 is not finite"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused_at_once(change, says, served, teacher):
    served.change = change
    with pytest.raises(TeacherError, match=rf"{served.url}: .*{says}"):
        teacher.score([[1, 2, 3, 4]], [[0, 1, 2]], 3)
    assert len(served.requests) == 1


@pytest.mark.parametrize("change", [lambda d: d.pop("choices"), lambda d: d["choices"].pop()])
def test_an_answer_that_is_not_whole_is_asked_for_again(change, served, teacher):
    served.change = change
    with pytest.raises(TeacherError, match="after 4 attempts"):
        teacher.score([[1, 2, 3, 4]], [[0, 1, 2]], 3)


def test_texts_instead_of_ids_are_refused(llama):
    def texts(document):
        if document["choices"][0]["logprobs"]:
            document["choices"][0]["logprobs"]["tokens"] = ["a"] * 9

    with serving(Served(llama.model.module, style="echo")) as served:
        served.change = texts
        with (
            ServerTeacher(DESCRIPTOR, [served.url], manners=QUICK) as teacher,
            pytest.raises(TeacherError, match="echoes texts and no token ids"),
        ):
            teacher.score([[1, 2, 3, 4]], [[0, 1, 2]], 3)


def test_a_dead_replica_is_passed_over_and_one_that_dies_hands_on_its_work(llama, caplog):
    sequences, wanted = conversations(count=6)
    with serving(Served(llama.model.module)) as good, serving(Served(llama.model.module)) as bad:
        bad.faults = ["hang up"] * 99
        with (
            caplog.at_level(logging.WARNING, "trainer"),
            ServerTeacher(DESCRIPTOR, [bad.url, dead_url(), good.url], manners=QUICK) as teacher,
        ):
            assert teacher.urls == [bad.url, good.url]
            found = teacher.score(sequences, wanted, 3)
    assert bad.requests
    for one, other in zip(found, llama.score(sequences, wanted, 3), strict=True):
        same(one, other)


def test_a_proxy_of_the_environment_is_used(served, llama, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", served.url)
    with ServerTeacher(DESCRIPTOR, ["http://teacher.invalid:8000/v1"], manners=QUICK) as teacher:
        same(teacher.score([[1, 2, 3]], [[0, 1]], 2)[0], llama.score([[1, 2, 3]], [[0, 1]], 2)[0])
    assert served.path == "http://teacher.invalid:8000/v1/completions"


def test_nobody_there_or_another_model_is_refused_at_the_start(served):
    with pytest.raises(TeacherError, match=r"no teacher can be reached: .*ConnectError.*TINY_URLS"):
        ServerTeacher(DESCRIPTOR, [dead_url()], manners=QUICK)
    other = Descriptor("gpt-oss-120b", "1", "high", "0" * 64)
    with pytest.raises(TeacherError, match=r"serves tiny, not gpt-oss-120b"):
        ServerTeacher(other, [served.url], manners=QUICK)


def test_tail_draws_are_refused_by_name(teacher):
    with pytest.raises(TeacherError, match="tail_draws = 8: a server gives its likeliest tokens"):
        teacher.score([[1, 2]], [[0]], 2, tail=TailDraws(8, [0]))


def test_the_key_is_sent_and_never_told(served, teacher, caplog):
    served.faults = ["500"] * 9
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(TeacherError) as told,
    ):
        teacher.score([[1, 2]], [[0]], 2)
    assert KEY not in str(told.value)
    assert KEY not in caplog.text
    assert KEY not in str(teacher.identity())
    assert served.headers["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(TeacherError, match="has a user or password in it") as told:
        ServerTeacher(DESCRIPTOR, [f"http://me:{KEY}@{served.url[7:]}"], manners=QUICK)
    assert KEY not in str(told.value)


def test_a_descriptor_opens_a_server_at_the_addresses_of_the_environment(served, tmp_path, monkeypatch):
    text = (
        '{"schema": "vpmoe.teacher/1", "kind": "server", "model": "tiny", "revision": "1a2b3c", '
        '"reasoning_mode": "high", "tokenizer_sha256": "%s"}'
    ) % ("0" * 64)
    (tmp_path / "teacher.json").write_text(text)
    monkeypatch.delenv("VPMOE_TEACHER_URL", raising=False)
    with pytest.raises(TeacherError, match="VPMOE_TEACHER_URL is not set"):
        open_teacher(tmp_path)
    monkeypatch.setenv("OURS", f" {served.url}/v1/ , ")
    with open_teacher(tmp_path, url_env="OURS") as teacher:
        assert teacher.identity() == teacher_identity(tmp_path, digest="-", dtype="fp32")
        assert teacher.identity() == {"kind": "server", "model": MODEL, "revision": "1a2b3c"}
        assert len(teacher.score([[1, 2, 3]], [[0, 1]], 2)[0]) == 2
    monkeypatch.setenv("OURS", "127.0.0.1:80")
    with pytest.raises(TeacherError, match="OURS: 1 of 1 addresses do not begin with http"):
        open_teacher(tmp_path, url_env="OURS")
    (tmp_path / "teacher.json").write_text(text.replace('"tiny"', '""'))
    with pytest.raises(TeacherError, match="model must be a text"):
        read_descriptor(tmp_path / "teacher.json")
    (tmp_path / "teacher.json").write_text(text[:40])
    with pytest.raises(TeacherError, match="describes no teacher"):
        read_descriptor(tmp_path / "teacher.json")


PATIENT = Manners(attempts=6, answer_seconds=300.0, first_pause=60.0, longest_pause=60.0, prompts=1)


@pytest.mark.parametrize("fault", ["stall", "503"])
def test_a_teacher_that_gives_up_ends_what_another_thread_waits_for(fault, served):
    """In the midst of an answer that does not come, and in the pause before the next attempt."""
    tokens, wanted = conversations(count=1)
    served.faults = [fault] * 6
    with (
        ThreadPoolExecutor(1) as pool,
        ServerTeacher(DESCRIPTOR, [served.url], manners=PATIENT) as teacher,
    ):
        asked = pool.submit(teacher.score, tokens, wanted, 0)
        while not served.requests:
            time.sleep(0.005)
        began = time.monotonic()
        teacher.give_up()
        with pytest.raises(TeacherError, match="asked nothing more"):
            asked.result()
        assert time.monotonic() - began < 2.0
    assert len(served.requests) == 1


def test_what_is_asked_beside_a_request_that_was_refused_is_not_tried_again(served):
    """One of two requests is refused for good while the other one's server is busy."""
    tokens, wanted = conversations(count=2)
    both = threading.Barrier(2)

    def fault(body):
        both.wait(5.0)
        return "400" if body["prompt"][0][0] == tokens[0][0] else "503"

    served.fault = fault
    manners = replace(PATIENT, first_pause=0.5, longest_pause=0.5)
    with ServerTeacher(DESCRIPTOR, [served.url], manners=manners) as teacher:
        assert tokens[0][0] != tokens[1][0]
        with pytest.raises(TeacherError, match="refuses: HTTP 400"):
            teacher.score(tokens, wanted, 0)
    assert len(served.requests) == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://me:word@127.0.0.1:9"), ("SSL_CERT_FILE", "/nonexistent.pem")],
)
def test_an_environment_in_which_no_connection_can_be_set_up_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(TeacherError, match=f"no connection can be set up .*{variable}=") as caught:
        ServerTeacher(DESCRIPTOR, [dead_url()], manners=QUICK)
    assert "word@" not in str(caught.value)
    assert silent(["http://127.0.0.1:9/v1"], "m")[0].count(f"{variable}=") == 1
