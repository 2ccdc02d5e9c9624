import pytest
import torch

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.model.context import ForwardContext
from trainer.model.gpt import build_model
from trainer.model.value_residual import initial_logit, mix_values


def logits_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("value_residual_logit")}


def test_initial_logit_has_its_golden_values():
    assert initial_logit(1.0, 1e-4) == pytest.approx(9.210240, abs=1e-6)
    assert initial_logit(1.0, 1e-2) == pytest.approx(4.595120, abs=1e-6)
    assert initial_logit(0.5, 1e-2) == 0.0
    assert initial_logit(0.0, 1e-2) == pytest.approx(-4.595120, abs=1e-6)


def test_every_layer_but_the_first_has_a_logit():
    names = list(logits_of(build_model(tiny("dense"))))
    assert names == [f"decoder.layers.{i}.self_attention.value_residual_logit" for i in (1, 2, 3)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_logit_moves_in_bf16(kind):
    model = build_model(tiny(kind, model={"value_residual_init": 1.0}), dtype=torch.bfloat16)
    logits = logits_of(model)
    assert {p.dtype for p in logits.values()} == {torch.float32}
    assert all(p.ndim == 0 for p in logits.values())
    before = {name: p.item() for name, p in logits.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model(*rows([[16]])).float().logsumexp(-1).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.item() != 0.0 for p in logits.values())
    optimizer.step()
    assert all(p.item() != before[name] for name, p in logits.items())


def test_logits_survive_casts_bit_for_bit():
    model = build_model(tiny("dense", model={"value_residual_init": 0.99}))
    before = {name: p.detach().clone() for name, p in logits_of(model).items()}
    for cast in (
        lambda: model.to(torch.bfloat16),
        model.bfloat16,
        model.half,
        lambda: model.float().bfloat16(),
    ):
        cast()
        assert all(torch.equal(p, before[name]) for name, p in logits_of(model).items())
    assert model.output_layer.weight.dtype == torch.bfloat16


def test_a_logit_cast_below_fp32_by_force_is_refused():
    model = build_model(tiny("dense"))
    logit = model.decoder.layers[2].self_attention.value_residual_logit
    logit.data = logit.data.bfloat16()
    with pytest.raises(TypeError, match=r"decoder\.layers\.2.*bfloat16.*float32"):
        model(*rows([[8]]))


def test_a_mixing_weight_of_one_is_plain_attention():
    model = randomize(build_model(tiny("dense")))
    plain = build_model(tiny("dense", model={"value_residual": False}))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "value_residual" not in k})
    batch = rows([[12]])
    assert (model(*batch) - plain(*batch)).abs().max() > 1e-3
    with torch.no_grad():
        for logit in logits_of(model).values():
            logit.fill_(40.0)
    assert torch.equal(model(*batch), plain(*batch))


def test_mixing_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    value, first = (torch.randn(3, 2, 2, 4, generator=generator).bfloat16() for _ in range(2))
    logit = torch.tensor(4.59512)
    lam = torch.sigmoid(logit.double())
    expected = (lam * value.double() + (1 - lam) * first.double()).bfloat16()
    torch.testing.assert_close(mix_values(value, first, logit), expected, rtol=0, atol=0)


def test_later_layers_train_the_first_layers_values():
    """With layer 1's own output cut off, its value factors can only learn through the layers above."""
    gradients = {}
    for on in (True, False):
        model = randomize(build_model(tiny("dense", model={"value_residual": on})))
        first = model.decoder.layers[0].self_attention
        with torch.no_grad():
            first.linear_proj.weight.zero_()
        model(*rows([[12]])).square().sum().backward()
        gradients[on] = first.linear_tpa.b_v.grad.abs().max().item()
    assert gradients[True] > 1e-4
    assert gradients[False] == 0.0


def test_first_values_are_missing_when_layers_run_out_of_order():
    model = build_model(tiny("dense"))
    _tokens, positions, documents = rows([[8]])
    context = ForwardContext(documents, positions, rotation=model.rotary_pos_emb(positions))
    with pytest.raises(RuntimeError, match="layer 3 needs the values of layer 1"):
        model.decoder.layers[2].self_attention(torch.zeros(8, 1, 32), attention_mask=context)
