"""`fused` against `reference` on a GPU: a whole step on packed rows, several micro-batches, an exact resume.

Nothing of it runs without a Hopper card and the packages of the extra `fused`; it is skipped loudly then.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks.step import check, require_right
from trainer.checkpoints.resume import Checkpoints
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.training import TrainRecipe
from trainer.job.distributed import Layout, session
from trainer.model.gpt import build_model
from trainer.profiling.mock import mock_data
from trainer.train.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
        reason="no CUDA device with flash-attn-4: the fused backend was NOT compared with the reference",
    ),
]
LAYERS = 4


def recipe_of(backend: str, rows: int = 1, micro: int = 1) -> TrainRecipe:
    """Four layers of the locked model."""
    recipe = plain(load_experiment("bench").train_recipe("vpmoe_stage1"))
    recipe |= {"steps": 20, "init": "fresh"}
    recipe["architecture"]["model"]["num_layers"] = LAYERS
    batch = {"global_batch_size": rows, "micro_batch_size": micro}
    recipe["training"] |= {"backend": backend, **batch}
    return parse(TrainRecipe, recipe)


def engine_of(recipe: TrainRecipe, layout: Layout) -> Engine:
    """An engine over mock conversations, from the seed."""
    model = build_model(
        recipe.architecture, dtype=torch.bfloat16, device="cuda", seed=7, backend=recipe.training.backend
    )
    data = mock_data(recipe.seq_len, recipe.architecture.vocab_size, 7)
    return Engine(model, recipe, data, layout, seed=7, config_hash="")


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies on the CPU."""
    return {name: p.detach().float().cpu() for name, p in engine.model.named_parameters()}


def moved(recipe: TrainRecipe, layout: Layout, steps: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the last step, and how far each parameter went."""
    engine = engine_of(recipe, layout)
    before = weights(engine)
    for _ in range(steps):
        loss = engine.step().loss
    after = weights(engine)
    engine.close()
    return loss, {name: after[name] - before[name] for name in before}


def test_hidden_states_and_gradients_are_the_references_on_packed_rows_with_padding():
    """Documents of one token and longer than the window are among them; see `benchmarks.step.packed_rows`."""
    with session("cuda"):
        require_right(check(LAYERS))


@pytest.mark.parametrize("rows", [1, 3], ids=["one micro-batch", "three: the further backward graph"])
def test_one_step_moves_weights_as_the_reference_does(rows):
    with session("cuda") as layout:
        loss, fused = moved(recipe_of("fused", rows), layout)
        expected_loss, reference = moved(recipe_of("reference", rows), layout)
    assert loss == pytest.approx(expected_loss, rel=2e-3)
    ours = torch.cat([fused[name].flatten() for name in reference])
    theirs = torch.cat([reference[name].flatten() for name in reference])
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.9
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.05)


def test_micro_batches_add_up_to_the_batch():
    with session("cuda") as layout:
        at_once, _ = moved(recipe_of("fused", rows=2, micro=2), layout, steps=2)
        apart, _ = moved(recipe_of("fused", rows=2, micro=1), layout, steps=2)
    assert apart == pytest.approx(at_once, rel=2e-3)


def test_a_resume_under_graphs_ends_in_the_same_bits(tmp_path: Path):
    recipe = recipe_of("fused", rows=2)
    with session("cuda") as layout:
        checkpoints = Checkpoints(tmp_path, layout, keep_last=1)
        whole = engine_of(recipe, layout)
        for _ in range(3):
            whole.step()
        whole.save(checkpoints, {})
        losses = [whole.step().loss for _ in range(2)]
        expected = weights(whole)
        assert whole.body.captured, "the steps were replayed"
        whole.close()
        del whole
        torch.cuda.empty_cache()
        again = engine_of(recipe, layout)
        again.resume(checkpoints, 3)
        assert [again.step().loss for _ in range(2)] == losses
        found = weights(again)
        again.close()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
