"""The losses over two gloo ranks: vocabulary-parallel, and data-parallel counts and metrics."""

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.losses.loss_cases import Head, micro_batch, recipe, scored_batch, scored_table
from tests.trainer.losses.loss_cases import V as VOCABULARY
from tests.trainer.losses.loss_cases import run as run_objective
from trainer.contract.kinds import CONVERSATIONS, SCORED
from trainer.errors import LossError
from trainer.losses.common.objective import load_objective
from trainer.losses.common.spans import SpanMetrics, SpanWeights, span_counts, token_weights
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.support_loss import chunked_support_loss

T, H, V = 23, 6, 34
WORLD = 2


def problem():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (T,), generator=generator)
    span_id = torch.randint(0, 3, (T,), generator=generator)
    span_id[: T // 2][span_id[: T // 2] == 2] = 1  # the first half lacks a span that the whole batch has
    return hidden, head, labels, {"loss_mask": (span_id > 0).float(), "span_id": span_id}


def run(hidden, head, labels, batch, counts, objective, group=None):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    weights = token_weights(batch, counts, objective).double()
    loss, ce = chunked_cross_entropy(hidden, head, labels, weights, group=group, chunk_tokens=4)
    loss.backward()
    return loss.detach(), ce, hidden.grad, head.grad


def run_support(hidden, head, labels, batch, counts, objective, group=None):
    """A loss of the label and of three other ids, one of them absent now and then."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    weights = token_weights(batch, counts, objective).double()
    others = torch.stack([(labels * factor + 1) % (V + 1) - 1 for factor in (1, 5, 7)], dim=1)
    support = torch.cat((labels.unsqueeze(1), others), dim=1)
    highest = torch.zeros(len(labels), dtype=torch.float64)

    def rule(logprobs, rows):
        rest = (1 - logprobs[:, 1:].exp().sum(dim=1)).clamp(min=1e-8)
        return -weights[rows] * (logprobs[:, 0] + rest.log())

    loss, each = chunked_support_loss(
        hidden, head, support, rule, select=weights != 0, highest=highest, group=group, chunk_tokens=4
    )
    loss.backward()
    return loss.detach(), each, highest, hidden.grad, head.grad


def divergence_over_ranks(rank, group):
    """The objective of stage 2: its head split over both ranks, then its micro-batches; one lacks scores."""
    asked = {"kd": {"kl_weight": 0.6, "target": "mix"}, "scored": scored_table()}
    objective = load_objective("topk_kl").of(recipe(objective="topk_kl", **asked), (SCORED, CONVERSATIONS))
    parts = [scored_batch(1)[0], micro_batch(2, (1, 2))]
    samples = {SCORED: 2, CONVERSATIONS: 2}
    weight = Head().weight.detach()[: VOCABULARY // WORLD * WORLD].clone()
    for _, batch in parts:
        for name in ("labels", "teacher_ids", "teacher_draws"):
            if name in batch:
                batch[name].clamp_(max=len(weight) - 1)
    loss, gradients, metrics = run_objective(objective, Head(weight.clone()), parts, samples)
    rows = slice(rank * len(weight) // WORLD, (rank + 1) * len(weight) // WORLD)
    split = run_objective(objective, Head(weight[rows].clone(), group), parts, samples)
    torch.testing.assert_close(split[1], [gradients[0][rows], *gradients[1:]])
    mine = run_objective(objective, Head(weight.clone()), [parts[rank]], samples, group)
    dist.all_reduce(mine[1][0])
    torch.testing.assert_close(mine[1], [gradients[0], gradients[1 + rank]])
    total = torch.tensor(mine[0])
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.tensor(loss))
    for other in (split[2], mine[2]):
        assert other.keys() == metrics.keys()
        assert all(abs(other[name] - value) < 1e-9 for name, value in metrics.items())


def work():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        group = dist.group.WORLD
        hidden, head, labels, batch = problem()
        objective = SpanWeights.conversations(0.5, 2.0)
        counts = span_counts([batch], objective)
        loss, ce, grad_hidden, grad_head = run(hidden, head, labels, batch, counts, objective)

        # Vocabulary-parallel: half of the head each, everything else the same.
        rows = slice(rank * V // WORLD, (rank + 1) * V // WORLD)
        found = run(hidden, head[rows], labels, batch, counts, objective, group)
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], ce)
        torch.testing.assert_close(found[2], grad_hidden)
        torch.testing.assert_close(found[3], grad_head[rows])
        both = [torch.empty_like(found[1]) for _ in range(WORLD)]
        dist.all_gather(both, found[1])
        assert torch.equal(both[0], both[1]), "tensor-parallel ranks must agree to the bit"
        wrong = labels.clone()
        wrong[batch["loss_mask"].nonzero()[0]] = V
        try:
            run(hidden, head[rows], wrong, batch, counts, objective, group)
        except LossError:
            pass
        else:
            raise AssertionError("a label beyond all shards was accepted")

        sparse = run_support(hidden, head, labels, batch, counts, objective)
        shared = run_support(hidden, head[rows], labels, batch, counts, objective, group)
        for ours, theirs in zip(shared, (*sparse[:-1], sparse[-1][rows]), strict=True):
            torch.testing.assert_close(ours, theirs)

        divergence_over_ranks(rank, group)

        # Data-parallel: half of the tokens each, gradients summed.
        part = slice(0, T // 2) if rank == 0 else slice(T // 2, T)
        mine = {name: tensor[part] for name, tensor in batch.items()}
        global_counts = span_counts([mine], objective, group)
        assert global_counts.tolist() == counts.tolist()
        part_loss, part_ce, part_hidden, part_head = run(
            hidden[part], head, labels[part], mine, global_counts, objective
        )
        dist.all_reduce(part_head)
        dist.all_reduce(part_loss)
        torch.testing.assert_close(part_head, grad_head)
        torch.testing.assert_close(part_hidden, grad_hidden[part])
        torch.testing.assert_close(part_loss, loss)
        whole, share = SpanMetrics(objective), SpanMetrics(objective)
        whole.add(batch, ce)
        share.add(mine, part_ce)
        expected, logged = whole.reduce(counts), share.reduce(global_counts, group)
        assert logged.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(logged[name] - value) < 1e-9, (name, logged[name], value)
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one():
    run_ranks(WORLD, work)
