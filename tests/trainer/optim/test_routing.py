"""Every parameter in exactly one group, with its rate and its decay."""

import pytest
import torch

from tests.trainer.optim.optim_models import PrescribedGradients, count_matrices, settings
from trainer.errors import OptimizerError
from trainer.optim.routing import route_model, route_parameter


def parameter(*shape, dtype=torch.float32, **marks):
    param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    for mark, value in marks.items():
        setattr(param, mark, value)
    return param


TABLE = {"is_embedding_or_output_parameter": True}


@pytest.mark.parametrize(
    ("param", "kind", "algorithm", "decay", "lr"),
    [
        (parameter(12, 8), "matrices", "normuon", 0.1, 2e-2),
        (parameter(4, 6, 8, matrix_batch=True, allreduce=False), "matrices", "normuon", 0.1, 2e-2),
        (parameter(50, 8, **TABLE), "embeddings", "adamw", 0.0, 3e-2),
        (parameter(8), "vectors", "adamw", 0.0, 3e-3),
        (parameter(), "vectors", "adamw", 0.0, 3e-3),
        (parameter(3, 4, adamw_only=True), "vectors", "adamw", 0.0, 3e-3),
        (parameter(2, 3, 4, adamw_only=True), "vectors", "adamw", 0.0, 3e-3),
        (parameter(4, 6, vector_batch=True, allreduce=False), "vectors", "adamw", 0.0, 3e-3),
    ],
)
def test_nature_decides_algorithm_decay_and_rate(param, kind, algorithm, decay, lr):
    route = route_parameter("p", param, settings())
    assert (route.kind, route.algorithm, route.weight_decay, route.lr) == (kind, algorithm, decay, lr)
    assert route.expert_parallel is not getattr(param, "allreduce", True)


@pytest.mark.parametrize(
    ("changes", "vectors", "embeddings"),
    [
        ({"normuon_aux_lr": None, "decoupled_lr": None}, 2e-2, 2e-2),
        ({"decoupled_lr": None}, 3e-3, 3e-3),
        ({"normuon_aux_lr": None}, 2e-2, 3e-2),
    ],
)
def test_unset_rates_fall_back_to_the_next_wider_one(changes, vectors, embeddings):
    config = settings(**changes)
    assert route_parameter("p", parameter(8), config).lr == vectors
    assert route_parameter("p", parameter(50, 8, **TABLE), config).lr == embeddings


def test_embedding_decay_is_a_key_of_its_own():
    config = settings(embedding_weight_decay=0.01)
    assert route_parameter("p", parameter(50, 8, **TABLE), config).weight_decay == 0.01
    assert route_parameter("p", parameter(8), config).weight_decay == 0.0


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_one_algorithm_for_everything(name):
    algorithm = {"adam": "adamw", "sgd": "sgd"}[name]
    config = settings(name=name)
    for param in (parameter(12, 8), parameter(8), parameter(50, 8, **TABLE)):
        assert route_parameter("p", param, config).algorithm == algorithm
    assert route_parameter("p", parameter(12, 8), config).weight_decay == 0.1


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (parameter(2, 3, 4), "no group.*matrix_batch = True"),
        (parameter(2, 3, 4, 5), "no group"),
        (parameter(2, 3, matrix_batch=True), "matrix_batch is for parameters of rank 3.*rank 2"),
        (parameter(2, 3, 4, 5, matrix_batch=True), "rank 4"),
        (parameter(3, vector_batch=True), "vector_batch is for parameters of rank 2"),
        (parameter(2, 3, 4, matrix_batch=True, adamw_only=True), "two groups.*matrix_batch and adamw_only"),
        (parameter(2, 3, adamw_only=True, **TABLE), "two groups"),
        (parameter(3, dtype=torch.bfloat16, keep_fp32=True), "must stay float32.*is torch.bfloat16"),
        (parameter(3, dtype=torch.float16), "float16"),
    ],
)
def test_a_parameter_of_no_or_two_natures_is_refused_by_name(param, message):
    with pytest.raises(OptimizerError, match=rf"decoder\.odd.*{message}"):
        route_parameter("decoder.odd", param, settings())


def test_a_tensor_under_two_names_is_refused():
    param = parameter(3, 4)
    with pytest.raises(OptimizerError, match="b and a are the same tensor"):
        route_model([("a", param), ("b", param)], settings())


def test_a_model_without_parameters_is_refused():
    with pytest.raises(OptimizerError, match="no parameters"):
        route_model([], settings())


def test_every_parameter_is_routed_once_in_model_order_frozen_or_not():
    model = PrescribedGradients()
    model.norm.requires_grad_(False)
    routed = route_model(model.named_parameters(), settings())
    assert [entry.name for entry in routed] == [name for name, _ in model.named_parameters()]
    assert count_matrices(routed) == 5 + 2 * 4


def full_size_matrices():
    """The NorMuon matrices of the 80-layer model with 256 experts, by shape."""
    for layer in range(1, 81):
        yield from [parameter_on_meta(1024, 1024)]  # output projection
        if layer % 4 == 0:
            yield parameter_on_meta(1536, 1024)
        else:
            for rows in (32, 4, 4, 512, 256, 256):
                yield parameter_on_meta(rows, 1024)
        if layer == 1:
            yield from (parameter_on_meta(512, 1024), parameter_on_meta(1024, 512))
        else:
            yield from (parameter_on_meta(512, 1024), parameter_on_meta(1024, 512))
            yield parameter_on_meta(256, 1024)
            yield parameter_on_meta(256, 128, 1024, matrix_batch=True, allreduce=False)
            yield parameter_on_meta(256, 1024, 128, matrix_batch=True, allreduce=False)


def parameter_on_meta(*shape, **marks):
    param = torch.nn.Parameter(torch.empty(shape, device="meta"))
    for mark, value in marks.items():
        setattr(param, mark, value)
    return param


def test_the_full_model_has_41147_matrices_40448_of_them_experts():
    routed = route_model(((f"p{i}", p) for i, p in enumerate(full_size_matrices())), settings())
    assert count_matrices(routed) == 41_147
    assert count_matrices(entry for entry in routed if entry.route.expert_parallel) == 40_448
