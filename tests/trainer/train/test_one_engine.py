"""One engine is in memory at a time: the resume check starts only when the trained model is gone."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.train.train_jobs import make_job, summary, tiny_recipe
from tests.trainer.train.train_work import run_train, train_until
from trainer.contract.status import EXIT_DONE, EXIT_INTERRUPTED
from trainer.job.distributed import session
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.train.drift import resume_drift
from trainer.train.engine import Engine
from trainer.train.run import Run

pytestmark = pytest.mark.slow

SHORT = {"steps": 3, "training.eval_interval": 2, "training.save_interval": 100}


def pieces(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Everything of an engine that is as large as a model, and what holds it."""
    yield "engine", engine
    yield "model", engine.model
    yield "optimizer", engine.optimizer
    yield "gradients", engine.optimizer.gradients
    for name, parameter in engine.model.named_parameters():
        yield f"{name}", parameter
        yield f"gradient of {name}", parameter.main_grad  # type: ignore[attr-defined]
        yield f"bucket of {name}", parameter.main_grad._base  # type: ignore[attr-defined]
    for part in engine.optimizer._parts:
        yield f"part {part.name}", part
        yield f"master of {part.name}", part.master
        for kind, tensor in part.state.items():
            yield f"{kind} of {part.name}", tensor


class Watch:
    """Wraps `Run.engine`: at each call it notes what is still alive of the engines made before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[list[str]] = []
        self.made: list[tuple[str, weakref.ref[Any]]] = []
        engine: Callable[..., Engine] = Run.engine
        watch = self

        def watched(run: Run, **options: Any) -> Engine:
            watch.alive.append([name for name, found in watch.made if found() is not None])
            new = engine(run, **options)
            watch.made += [(name, weakref.ref(piece)) for name, piece in pieces(new)]
            return new

        monkeypatch.setattr(Run, "engine", watched)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_trained_engine_is_gone_when_the_resume_check_makes_its_own(
    dtype, tmp_path, conversations, monkeypatch
):
    watch = Watch(monkeypatch)
    job = make_job(
        tmp_path, conversations, recipe=tiny_recipe(**SHORT, **{"training.dtype": dtype}), wandb="offline"
    )
    assert run_train(job, verify=True) == EXIT_DONE
    assert summary(job)["resume_drift"] == 0.0
    assert watch.alive == [[], []], "two engines were made, and nothing of the first was left for the second"
    assert len(watch.made) > 200
    gc.collect()
    assert [name for name, found in watch.made if found() is not None] == []


def test_nothing_is_left_of_the_engine_of_a_resumed_run_either(tmp_path, conversations, monkeypatch):
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**SHORT))
    assert train_until(job, 2) == EXIT_INTERRUPTED
    watch = Watch(monkeypatch)
    assert run_train(job, verify=True) == EXIT_DONE
    assert watch.alive == [[], []]


def test_memory_is_given_back_to_the_device_before_the_second_engine_is_made(monkeypatch):
    did: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: did.append("collect"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("empty"))

    def fresh() -> Engine:
        did.append("fresh")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        resume_drift(fresh, None, 6, 8)  # type: ignore[arg-type]
    assert did == ["collect", "empty", "fresh"]


def test_closing_an_engine_frees_all_but_the_model(tmp_path, conversations):
    """What still holds a closed engine holds no gradient, master weight or optimizer state."""
    job = make_job(tmp_path, conversations, recipe=tiny_recipe(**{"training.dtype": "bf16"}))
    with session("cpu") as layout:
        run = Run(job, job.train_recipe(), WorkDir(Path(job.work_dir)), StopRequest(), layout)
        engine = run.engine()
        engine.step()
        weights = {id(parameter) for parameter in engine.model.parameters()}
        found = [
            (name, weakref.ref(piece))
            for name, piece in pieces(engine)
            if isinstance(piece, torch.Tensor) and id(piece) not in weights
        ]
        engine.close()
        gc.collect()
        assert [name for name, piece in found if piece() is not None] == []
