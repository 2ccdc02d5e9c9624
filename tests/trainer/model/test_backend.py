"""One seam for every backend: the recipe's word is a module's name, and weights are the same under all."""

import dataclasses
import importlib

import pytest
import torch

from tests.trainer.model.model_cases import randomize, rows, tiny
from tests.trainer.other_backend import add_backend
from trainer.contract.fusions import FUSIONS, fusions_of
from trainer.contract.keeping import KEEPS, keeps_of
from trainer.contract.schema.base import ConfigError
from trainer.contract.words import BACKENDS, require_word, words
from trainer.model.backend import load_backend
from trainer.model.experts import StackedExperts
from trainer.model.gpt import build_model

ABSENT = '''
"""Needs what this machine has not."""

import a_package_that_nobody_has

FUSIONS = ()
KEEPS = ()
'''


@pytest.fixture
def other(monkeypatch, tmp_path):
    return add_backend(monkeypatch, tmp_path)


def shapes(model):
    return {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["compat", "dense", "moe"])
@pytest.mark.parametrize("backend", [*words(BACKENDS), "gathering"])
def test_every_backend_has_the_parameters_of_the_reference(kind, backend, other):
    ours = build_model(tiny(kind), backend=backend, device="meta")
    assert shapes(ours) == shapes(build_model(tiny(kind), device="meta"))
    buffers = {name for name, _ in ours.named_buffers()}
    assert buffers == {name for name, _ in build_model(tiny(kind), device="meta").named_buffers()}


def test_another_backend_computes_with_its_own_parts_from_the_same_weights(other):
    reference = randomize(build_model(tiny("moe")))
    gathering = build_model(tiny("moe"), backend=other)
    gathering.load_state_dict(reference.state_dict())
    assert type(gathering.moe_layers[0].experts).__name__ == "GatheredExperts"
    assert type(reference.moe_layers[0].experts) is StackedExperts
    batch = rows([[7, 5], [9]], width=14)
    real = batch[2] >= 0
    torch.testing.assert_close(gathering(*batch)[real], reference(*batch)[real], rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_model_is_its_backends(other, monkeypatch):
    model = build_model(tiny("dense"), backend=other)
    tokens, positions, documents = rows([[6], [4, 2]])
    hidden = model.forward_hidden(tokens, positions, documents)
    labels, select = tokens.roll(-1, dims=1), torch.rand(tokens.shape) < 0.6
    weights = torch.rand(tokens.shape)
    loss, each = model.cross_entropy(hidden, labels, weights, select)
    logits = torch.einsum("sbh,vh->bsv", hidden, model.head_weight)
    dense = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(each, torch.where(select, dense, 0.0).detach())
    torch.testing.assert_close(loss, (weights * torch.where(select, dense, 0.0)).sum())
    support = torch.stack((labels, tokens), dim=2)
    each = model.support_loss(
        hidden, support, lambda found, places: -weights.view(-1)[places] * found[:, 1], select
    )[1]
    own = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(each, (weights * torch.where(select, own, 0.0)).detach())
    doubled = dataclasses.replace(model.backend, loss=lambda *a, **k: [2 * x for x in model_loss(*a, **k)])
    model_loss = model.backend.loss
    model.backend = doubled
    torch.testing.assert_close(model.cross_entropy(hidden, labels, weights, select)[0], 2 * loss)


@pytest.mark.parametrize("word", ["turbo", "backend", "__init__", ""])
def test_a_word_without_a_module_is_refused_with_what_there_is(word):
    with pytest.raises(ConfigError, match=rf"training\.backend: found '{word}'; allowed: .*'reference'"):
        load_backend(word)
    with pytest.raises(ConfigError, match=rf"training\.backend: found '{word}'; allowed: .*'reference'"):
        build_model(tiny("dense"), backend=word, device="meta")


def test_a_backend_whose_package_is_missing_is_refused_with_the_remedy(monkeypatch, tmp_path):
    add_backend(monkeypatch, tmp_path, "absent", ABSENT)
    message = (
        r"training\.backend = 'absent': not available.*a_package_that_nobody_has.*set training\.backend ="
    )
    with pytest.raises(ConfigError, match=message):
        build_model(tiny("dense"), backend="absent", device="meta")
    build_model(tiny("dense"), device="meta")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_is_refused_by_a_backend_that_does_not_honour_it(fusion, other):
    also = f", or training.backend to 'fused' or '{other}'" if fusion == "grouped_gemm" else "$"
    message = rf"moe\.{fusion} = true, but training\.backend = 'reference' .*set moe\.{fusion} = false{also}"
    with pytest.raises(ConfigError, match=message):
        build_model(tiny("moe", moe={fusion: True}), device="meta")


def test_a_fusion_is_accepted_by_a_backend_that_honours_it_and_reaches_its_parts(other):
    model = build_model(tiny("moe", moe={"grouped_gemm": True}), backend=other, device="meta")
    assert model.config.fusions == ("grouped_gemm",)
    with pytest.raises(ConfigError, match=r"moe\.router_fusion = true, but training\.backend = 'gathering'"):
        build_model(tiny("moe", moe={"router_fusion": True}), backend=other, device="meta")


@pytest.mark.parametrize("backend", words(BACKENDS))
def test_what_is_read_of_a_backend_is_what_it_says(backend):
    module = importlib.import_module(f"{BACKENDS}.{backend}")
    assert fusions_of(words(BACKENDS)[backend]) == set(module.FUSIONS) <= set(FUSIONS)
    assert keeps_of(words(BACKENDS)[backend]) == set(module.KEEPS) <= set(KEEPS)
    assert module.BACKEND.optimizer_kernels is ("low_halves" in module.KEEPS)


def test_a_backend_without_the_literal_is_named(tmp_path):
    (tmp_path / "silent.py").write_text('"""Says nothing."""\n')
    with pytest.raises(ValueError, match=r"silent\.py assigns no FUSIONS"):
        fusions_of(tmp_path / "silent.py")
    with pytest.raises(ValueError, match=r"silent\.py assigns no KEEPS"):
        keeps_of(tmp_path / "silent.py")


def test_what_a_backend_keeps_is_said_in_known_words(tmp_path):
    (tmp_path / "vague.py").write_text('KEEPS = ("low_halves", "a_lot")\n')
    with pytest.raises(ValueError, match=r"vague\.py: KEEPS has 'a_lot'; allowed: attention_sums, "):
        keeps_of(tmp_path / "vague.py")


def test_words_are_modules_and_not_packages_or_private_ones(monkeypatch, tmp_path):
    before = set(words(BACKENDS))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "_private.py").write_text("")
    add_backend(monkeypatch, tmp_path, "turbo", 'raise SystemExit("imported")')
    assert set(words(BACKENDS)) == before | {"turbo"}
    require_word(BACKENDS, "turbo", "training.backend")
