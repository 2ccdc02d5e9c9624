"""The same model on a GPU: the same weights, the CPU's results, and the same bits twice."""

import pytest
import torch

from tests.trainer.model.model_cases import VOCAB, randomize, rows, tiny
from trainer.model.gpt import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the model was not run on one"),
]
KINDS = ["compat", "dense", "moe"]


def run(kind, device, dtype=torch.float32):
    model = randomize(build_model(tiny(kind)).to(dtype=dtype)).to(device)
    batch = tuple(tensor.to(device) for tensor in rows([[30, 9, 14], [50]], width=60))
    weights = torch.randn(2, 60, VOCAB, generator=torch.Generator().manual_seed(0)).to(device)
    mask = batch[2] >= 0
    logits = model(*batch)
    ((logits * weights)[mask].sum() + model.pop_aux_loss()).backward()
    counts = model.router_counts().cpu() if model.moe_layers else None
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    return logits[mask].detach().float().cpu(), gradients, counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_on_the_gpu_has_the_cpus_weights(kind):
    for dtype in (torch.float32, torch.bfloat16):
        here, there = (build_model(tiny(kind), dtype=dtype, device=device) for device in ("cpu", "cuda"))
        for (name, a), b in zip(here.named_parameters(), there.named_parameters(), strict=True):
            assert b[1].is_cuda
            assert torch.equal(a, b[1].cpu()), name
            assert a.__dict__ == b[1].__dict__, name


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_logits_and_gradients_equal_the_cpus(kind):
    (logits, gradients, counts), (expected, wanted, routed) = run(kind, "cuda"), run(kind, "cpu")
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-3 * scale, msg=name)
    assert counts is None or torch.equal(counts, routed)


@pytest.mark.parametrize("kind", ["compat", "dense"])
def test_bf16_logits_are_near_the_cpus_fp32(kind):
    logits, gradients, _ = run(kind, "cuda", torch.bfloat16)
    expected, wanted, _ = run(kind, "cpu")
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert all(gradients[name].isfinite().all() and gradients[name].any() for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_two_passes_give_the_same_bits(kind):
    (logits, gradients, _), (again, same, _) = (run(kind, "cuda", torch.bfloat16) for _ in range(2))
    assert torch.equal(logits, again)
    # The embedding's gradient adds up repeated tokens in no fixed order.
    for name in gradients.keys() - {"embedding.word_embeddings.weight"}:
        assert torch.equal(gradients[name], same[name]), name
