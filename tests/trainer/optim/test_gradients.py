import pytest
import torch

from tests.trainer.optim.optim_models import SPECS, PrescribedGradients, settings, whole
from trainer.errors import MissingGradientError, OptimizerError
from trainer.model.parameters import mark_written
from trainer.optim.gradients import Gradients
from trainer.optim.routing import route_model
from trainer.optim.topology import Topology


def gradients_of(model, **options):
    return Gradients(route_model(model.named_parameters(), settings()), Topology(), **options)


def test_micro_batches_add_up_in_float32_and_grad_is_freed():
    """256 + 1 + 1 is 256 in bfloat16 and 258 in float32."""
    model = PrescribedGradients(dtype=torch.bfloat16)
    gradients = gradients_of(model)
    for name, param in model.named_parameters():
        param.requires_grad_(name == "norm")
    for scale in (256.0, 1.0, 1.0):
        (model.norm.sum() * scale).backward()
        assert model.norm.grad is None
    gradients.reduce()
    assert model.norm.dtype == torch.bfloat16
    assert torch.equal(model.norm.main_grad, torch.full((8,), 258.0))


def test_the_result_does_not_depend_on_buckets():
    for bucket in (1, 100, 1 << 20):
        model = PrescribedGradients()
        gradients = gradients_of(model, bucket_elements=bucket)
        model.backward(0)
        gradients.reduce()
        for name in SPECS:
            torch.testing.assert_close(getattr(model, name).main_grad, whole(name, 100))


def test_parameters_share_no_memory_and_start_aligned():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    for name in SPECS:
        getattr(model, name).main_grad.fill_(list(SPECS).index(name))
    for name in SPECS:
        grad = getattr(model, name).main_grad
        assert (grad == list(SPECS).index(name)).all()
        assert grad.data_ptr() % 64 == gradients._buckets[0][0].data_ptr() % 64


def test_zero_forgets_everything():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0)
    gradients.zero()
    with pytest.raises(MissingGradientError, match=f"{len(SPECS)} of {len(SPECS)} parameters"):
        gradients.reduce()


def test_the_first_gradient_of_a_step_replaces_what_the_step_before_left():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    for name in SPECS:
        getattr(model, name).main_grad.fill_(float("nan"))
    gradients.zero()
    model.backward(0)
    gradients.reduce()
    for name in SPECS:
        torch.testing.assert_close(getattr(model, name).main_grad, whole(name, 100))


def test_parameters_without_gradient_are_refused_by_name():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0, skip=("qkv", "bias1"))
    with pytest.raises(MissingGradientError, match=rf"qkv, bias1: 2 of {len(SPECS)} parameters"):
        gradients.reduce()


def write_past_autograd(model, *names):
    """What a fused weight-gradient kernel or a replayed graph does."""
    for name in names:
        getattr(model, name).main_grad.add_(whole(name, 100))


def test_gradients_written_past_autograd_are_refused_unless_they_are_marked():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0, skip=("weight1", "weight2"))
    write_past_autograd(model, "weight1", "weight2")
    mark_written(model.weight1)
    with pytest.raises(MissingGradientError, match=r"weight2: 1 of .*mark_written"):
        gradients.reduce()


def test_marked_gradients_count_beside_those_of_autograd():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0, skip=("weight1", "weight2"))
    write_past_autograd(model, "weight1", "weight2")
    mark_written(model.weight1, model.weight2)
    assert all(gradients.reduce())
    for name in SPECS:
        torch.testing.assert_close(getattr(model, name).main_grad, whole(name, 100))


def test_a_mark_holds_for_one_step():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    for _ in range(2):
        model.backward(0, skip=("weight1",))
        write_past_autograd(model, "weight1")
        mark_written(model.weight1)
        assert all(gradients.reduce())
        gradients.zero()
    model.backward(0, skip=("weight1",))
    with pytest.raises(MissingGradientError, match="weight1: 1 of"):
        gradients.reduce()


def test_gradients_written_past_autograd_after_the_reduction_are_refused():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0)
    gradients.reduce()
    write_past_autograd(model, "weight1")
    mark_written(model.weight1)
    with pytest.raises(OptimizerError, match="weight1: gradients were written after step"):
        gradients.zero()


def test_a_parameter_frozen_at_first_takes_part_once_thawed():
    model = PrescribedGradients()
    model.qkv.requires_grad_(False)
    gradients = gradients_of(model)
    assert not model.qkv.requires_grad
    model.backward(0)
    assert not gradients.reduce()[list(SPECS).index("qkv")]
    model.qkv.requires_grad_(True)
    gradients.zero()
    model.backward(0)
    assert gradients.reduce()[list(SPECS).index("qkv")]
    torch.testing.assert_close(model.qkv.main_grad, whole("qkv", 100))


def test_a_sparse_gradient_is_refused_by_name():
    model = torch.nn.Module()
    model.table = torch.nn.Embedding(10, 4, sparse=True)
    gradients = gradients_of(model)
    with pytest.raises(OptimizerError, match=r"table\.weight: sparse gradients"):
        model.table(torch.tensor([1, 2])).sum().backward()
    del gradients


def test_a_backward_pass_after_the_reduction_is_refused():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0)
    gradients.reduce()
    with pytest.raises(OptimizerError, match="without zero_grad"):
        model.backward(1)


def test_reducing_twice_is_refused():
    model = PrescribedGradients()
    gradients = gradients_of(model)
    model.backward(0)
    gradients.reduce()
    with pytest.raises(OptimizerError, match="already reduced"):
        gradients.reduce()


def test_two_optimizers_cannot_hold_one_model_but_may_follow_each_other():
    model = PrescribedGradients()
    first = gradients_of(model)
    with pytest.raises(OptimizerError, match="already belongs to another optimizer"):
        gradients_of(model)
    first.close()
    second = gradients_of(model)
    model.backward(0)
    assert all(second.reduce())


def test_an_expert_parameter_cannot_ask_for_a_tensor_parallel_sum():
    model = PrescribedGradients()
    model.weight1.tp_grad_sum = True
    with pytest.raises(OptimizerError, match=r"weight1.*tensor-parallel gradient sum"):
        gradients_of(model)
