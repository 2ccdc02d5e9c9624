"""Passes without a graph, and what decides whether there is one; graphs themselves need a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.contract.schema.base import ConfigError
from trainer.model.document_mask import Documents, fill_borders
from trainer.model.gpt import build_model
from trainer.train.captured import Body, count_documents


def naive_borders(doc_id: torch.Tensor) -> list[int]:
    places, length = [], doc_id.shape[1]
    for row, documents in enumerate(doc_id.tolist()):
        for at, document in enumerate(documents):
            if at == 0 or documents[at - 1] != document:
                places.append(row * length + at)
    return [*places, doc_id.numel()]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(0, 5)
)
def test_borders_are_where_documents_change_with_and_without_room(rows_of, spare):
    doc_id = torch.tensor(rows_of)
    expected = naive_borders(doc_id)
    assert Documents(doc_id).borders.tolist() == expected
    assert count_documents(doc_id) == len(expected) - 1
    room = torch.full((len(expected) + spare,), -7, dtype=torch.int32)
    fill_borders(doc_id, room)
    assert room.tolist() == expected + [doc_id.numel()] * spare


def test_without_a_graph_a_pass_is_the_models_own():
    model = randomize(build_model(tiny("moe")))
    tokens, positions, documents = rows([[7, 5], [9]], width=14)
    body = Body(model)
    assert not body.prepare(tokens, positions, documents, count_documents(documents))
    hidden, aux = body(tokens, positions, documents, count_documents(documents))
    assert torch.equal(hidden, model.forward_hidden(tokens, positions, documents))
    assert torch.equal(aux, model.pop_aux_loss())


def test_the_fused_backend_is_refused_without_a_gpu_and_names_the_remedy():
    with pytest.raises(ConfigError, match=r"training\.dtype: found torch\.float32; .*'reference'"):
        build_model(tiny("dense"), backend="fused")
    with pytest.raises(ConfigError, match=r"model\.head_dim = \d+: .* 64 or 128; .*'reference'"):
        build_model(tiny("dense"), backend="fused", dtype=torch.bfloat16)
    wide = tiny("dense", model={"head_dim": 64, "hidden_size": 256})
    with pytest.raises(ConfigError, match=r"'fused': its attention runs on CUDA, .* cpu; .*'reference'"):
        build_model(wide, backend="fused", dtype=torch.bfloat16)
