"""Top-K divergence against dense formulas in float64, the exact KL, and TRL's losses."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.losses.loss_cases import (
    MANIFEST,
    MEANS,
    Head,
    K,
    M,
    V,
    micro_batch,
    recipe,
    run,
    scored_batch,
    scored_table,
    student_logprobs,
    take,
)
from trainer.contract.kinds import CONVERSATIONS, SCORED
from trainer.contract.schema.base import ConfigError
from trainer.errors import LossError
from trainer.losses.common.objective import load_objective

KINDS = (SCORED, CONVERSATIONS)
RESCORED = {"tau": 2.0, "w_min": 0.25, "w_max": 4.0}


def asked(table: dict[str, Any] | None = None, **kd: Any):
    weights = {"span_weight_reasoning": 0.7, "span_weight_final": 1.9, "kl_weight": 0.6, "target": "bucket"}
    return recipe(objective="topk_kl", kd=weights | kd, scored=table or scored_table())


def objective(table: dict[str, Any] | None = None, **kd: Any):
    made = load_objective("topk_kl").of(asked(table, **kd), KINDS)
    made.use_store(MANIFEST | ({} if table is None else {"topk": table["topk"]}))
    return made


def by_formula(head, parts, target, rescored, share, kl_weight=0.6):
    """The objective written out over all tokens, token by token; also its pieces by span."""
    sums: dict[int, list[torch.Tensor]] = {}
    pieces: dict[int, list[tuple[float, float, float]]] = {}
    for hidden, batch in parts:
        logprobs = student_logprobs(head, hidden)
        for row, t in (batch["loss_mask"] > 0).nonzero().tolist():
            span = int(batch["span_id"][row, t])
            own = logprobs[row, t]
            ce = -own[batch["labels"][row, t]]
            if span < 4:
                sums.setdefault(span, []).append(ce)
                continue
            ids = batch["teacher_ids"][row, t]
            q = batch["teacher_logprobs"][row, t].double().exp()
            tail = batch["teacher_tail"][row, t].double()
            p = own[ids].exp()
            kept = (q * (q.log() - p.log())).sum()
            bucket = kept + tail * (tail.log() - (1 - p.sum()).log())
            drawn = own[batch["teacher_draws"][row, t]]
            unbiased = kept + tail * tail.log() - (tail * drawn).mean()
            kl = {"bucket": bucket, "unbiased": unbiased, "mix": (bucket + unbiased) / 2}[target]
            weight = torch.ones((), dtype=torch.float64)
            if rescored:
                mean = MEANS["reasoning" if span == 4 else "final"]
                weight = ((batch["teacher_label_logprob"][row, t].double() - mean) / 2.0).exp()
                weight = weight.clamp(0.25, 4.0)
            sums.setdefault(span, []).append(kl_weight * kl + (1 - kl_weight) * weight * ce)
            pieces.setdefault(span, []).append((ce.item(), bucket.item(), weight.item()))
    value = torch.zeros((), dtype=torch.float64)
    for span, terms in sums.items():
        part = share if span >= 4 else 1 - share
        value = value + part * {1: 0.7, 2: 1.9, 4: 0.7, 5: 1.9}[span] * torch.stack(terms).mean()
    return value, pieces


@pytest.mark.parametrize("rescored", [False, True], ids=["plain", "rescored"])
@pytest.mark.parametrize("target", ["bucket", "unbiased", "mix"])
def test_loss_and_gradients_are_those_of_the_formula(target, rescored):
    made = objective(target=target, rescored=RESCORED if rescored else None)
    head = Head()
    parts = [scored_batch(1)[0], scored_batch(2, (1, 2, 4, 5))[0], micro_batch(3, (1, 2))]
    loss, gradients, metrics = run(made, head, parts, {SCORED: 3, CONVERSATIONS: 3})
    expected, pieces = by_formula(head, parts, target, rescored, 0.5)
    wanted = torch.autograd.grad(expected, [head.weight, *(hidden for hidden, _ in parts)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8)
    for span, name in ((4, "scored_reasoning"), (5, "scored_final")):
        ce, bucket, weight = (sum(column) / len(column) for column in zip(*pieces[span], strict=True))
        assert metrics[f"ce/{name}"] == pytest.approx(ce)
        assert metrics[f"kl/{name}"] == pytest.approx(bucket)  # of every target
        assert 0 < metrics[f"teacher_mass/{name}"] < 1
        if rescored:
            assert metrics[f"rescoring/{name}"] == pytest.approx(weight, rel=1e-6)
        else:
            assert f"rescoring/{name}" not in metrics
    assert "kl/reasoning" not in metrics


def test_agreement_is_the_share_of_tokens_with_the_same_likeliest_id():
    made, head = objective(), Head()
    (hidden, batch), _ = scored_batch(1, (4,))
    same = student_logprobs(head, hidden).argmax(dim=-1) == batch["teacher_ids"][..., 0]
    metrics = run(made, head, [(hidden, batch)], {SCORED: 2})[2]
    share = same[batch["loss_mask"] > 0].double().mean().item()
    assert metrics["top1_agreement/scored_reasoning"] == pytest.approx(share)
    with torch.no_grad():  # a student that is sure of the teacher's first id agrees everywhere
        batch["teacher_ids"][..., 0] = student_logprobs(head, hidden).argmax(dim=-1)
    batch["teacher_ids"][..., 1:] = -1
    assert run(made, head, [(hidden, batch)], {SCORED: 2})[2]["top1_agreement/scored_reasoning"] == 1.0


def exact(teacher, head, hidden, batch):
    """Mean KL(teacher || student) over supervised tokens."""
    each = F.kl_div(student_logprobs(head, hidden), teacher, reduction="none", log_target=True).sum(-1)
    return each[batch["loss_mask"] > 0].mean()


@pytest.mark.parametrize("target", ["bucket", "unbiased", "mix"])
def test_with_the_whole_vocabulary_kept_it_is_the_kl(target):
    made = objective(scored_table(topk=V), kl_weight=1.0, target=target, span_weight_reasoning=1.0)
    head = Head()
    (hidden, batch), teacher = scored_batch(4, (4,), topk=V)
    batch["teacher_tail"].zero_()
    loss, gradients, _ = run(made, head, [(hidden, batch)], {SCORED: 2})
    expected = exact(teacher, head, hidden, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [head.weight, hidden]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_unbiased_target_has_the_gradient_of_the_kl_in_expectation():
    """One draw, every id of the tail in its turn, weighed by how often it would be drawn."""
    made = objective(kl_weight=1.0, target="unbiased", span_weight_reasoning=1.0)
    head = Head()
    (hidden, batch), teacher = scored_batch(5, (4,))
    batch["teacher_logprobs"], batch["teacher_ids"] = teacher.topk(K, dim=-1)
    tail = teacher.exp().scatter(-1, batch["teacher_ids"], 0.0)
    batch["teacher_tail"] = tail.sum(dim=-1)
    batch["loss_mask"][0, 4:] = batch["loss_mask"][1] = 0.0  # a few tokens: each is done 15 times
    mean = [torch.zeros_like(head.weight), torch.zeros_like(hidden)]
    odds = (tail / tail.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    supervised = batch["loss_mask"] > 0
    for token in supervised.nonzero().tolist():
        alone = batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])}
        alone["loss_mask"][tuple(token)] = 1.0
        for place in range(V - K):
            alone["teacher_draws"] = odds.indices[..., place : place + 1].expand(-1, -1, M).contiguous()
            gradients = run(made, head, [(hidden, alone)], {SCORED: 2})[1]
            chance = odds.values[(*token, place)]
            for total, gradient in zip(mean, gradients, strict=True):
                total += chance * gradient.detach() / supervised.sum()
    wanted = torch.autograd.grad(exact(teacher, head, hidden, batch), [head.weight, hidden])
    for ours, theirs in zip(mean, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 4.0))
def test_the_bucket_lies_between_nothing_and_the_whole_kl(seed, spread):
    made, head = objective(kl_weight=1.0, span_weight_reasoning=1.0), Head()
    (hidden, batch), teacher = scored_batch(seed, (4,))
    teacher = ((1 + spread) * teacher).log_softmax(dim=-1)
    batch["teacher_logprobs"], batch["teacher_ids"] = teacher.topk(K, dim=-1)
    batch["teacher_tail"] = 1 - batch["teacher_logprobs"].exp().sum(dim=-1)
    whole = exact(teacher, head, hidden, batch).item()
    loss = run(made, head, [(hidden, batch)], {SCORED: 2})[0]
    assert -1e-9 <= loss <= whole + 1e-9


def of_trl(*names: str) -> list[Any]:
    """Functions of TRL's source, alone: importing its trainers takes longer than all tests here."""
    found = find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0])
    path = folder / "experimental/server_distillation/server_distillation_trainer.py"
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(tree, str(path), "exec"), space)
    return [space[name] for name in names]


def test_the_bucket_is_the_forward_kl_with_a_tail_of_trl():
    divergence, add_tail_bucket = of_trl("_jsd_divergence", "_add_tail_bucket")
    made = objective(kl_weight=1.0, span_weight_reasoning=1.0)
    head = Head()
    (hidden, batch), teacher = scored_batch(6, (4,))
    batch["teacher_ids"][0, 0, 2:], batch["teacher_logprobs"][0, 0, 2:] = -1, -torch.inf  # adaptive K
    present = batch["teacher_ids"] >= 0
    places = batch["teacher_ids"].clamp(min=0)
    sparse = [
        logprobs.gather(-1, places).masked_fill(~present, -torch.inf)
        for logprobs in (student_logprobs(head, hidden), teacher)
    ]
    batch["teacher_tail"] = 1 - sparse[1].exp().sum(dim=-1)
    batch["teacher_logprobs"] = sparse[1]
    (ours, mask), (theirs, _) = (add_tail_bucket(logprobs, present) for logprobs in sparse)
    each = divergence(ours, theirs, 0, mask).sum(dim=-1)
    expected = each[batch["loss_mask"] > 0].mean()
    loss, gradients, metrics = run(made, head, [(hidden, batch)], {SCORED: 2})
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["kl/scored_reasoning"] == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, [head.weight, hidden]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_any_split_into_micro_batches_has_the_same_gradient():
    made = objective(target="mix", rescored=RESCORED)
    whole = [scored_batch(seed, spans)[0] for seed, spans in ((1, (4, 5)), (2, (1, 2)), (3, (1, 4)))]
    samples = {SCORED: 4, CONVERSATIONS: 2}
    results = []
    for split in ([[0, 1, 2, 3, 4, 5]], [[0, 4], [1, 2, 3], [5]], [[row] for row in range(6)]):
        head = Head()
        loss, gradients, metrics = run(made, head, [take(whole, rows) for rows in split], samples)
        order = torch.tensor([row for rows in split for row in rows])
        hidden = torch.cat(gradients[1:], dim=1)[:, order.argsort()]
        results.append((loss, gradients[0], hidden, metrics))
    for other in results[1:]:
        assert other[0] == pytest.approx(results[0][0], rel=1e-9)
        torch.testing.assert_close(other[1], results[0][1])
        torch.testing.assert_close(other[2], results[0][2])
        for name, value in results[0][3].items():
            if not name.startswith("absent/"):
                assert other[3][name] == pytest.approx(value, rel=1e-9), name


def test_a_student_without_a_tail_has_finite_gradients():
    """The clamp of p_*: all of the student's mass on the kept ids, a tenth of the teacher's beyond them."""
    made, head = objective(kl_weight=1.0), Head()
    (hidden, batch), _ = scored_batch(7)
    with torch.no_grad():
        hidden *= 200.0
        batch["teacher_ids"][..., 0] = student_logprobs(head, hidden).argmax(dim=-1)
    batch["teacher_tail"].fill_(0.1)
    loss, gradients, _ = run(made, head, [(hidden, batch)], {SCORED: 2})
    assert torch.isfinite(torch.tensor(loss))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_measured_samples_have_the_loss_of_the_same_global_batch_and_comparable_numbers():
    made, head = objective(rescored=RESCORED), Head()
    parts = [scored_batch(1)[0], micro_batch(3, (1, 2))]
    trained, _, metrics = run(made, head, parts, {SCORED: 2, CONVERSATIONS: 2})
    with torch.no_grad():
        measured = [made.token_measures(head, hidden, batch) for hidden, batch in parts]
        plain = [made.token_losses(head, hidden, batch) for hidden, batch in parts]
    assert set(measured[0]) == {"loss", "objective", "kl"}
    assert set(measured[1]) == {"loss", "objective"}
    ids = torch.cat([batch["span_id"] for _, batch in parts])
    losses, values = (torch.cat([part[name] for part in measured]) for name in ("loss", "objective"))
    torch.testing.assert_close(losses, torch.cat(plain))
    means = [values[ids == span.id].mean().item() for span in made.mixture.spans.spans]
    counts = torch.tensor([float((ids == span.id).sum()) for span in made.mixture.spans.spans])
    assert made.value(means, counts, {SCORED: 0.5, CONVERSATIONS: 0.5}) == pytest.approx(trained, rel=1e-6)
    kl = measured[0]["kl"][parts[0][1]["span_id"] == 4].mean().item()
    assert kl == pytest.approx(metrics["kl/scored_reasoning"])


REFUSED = [
    ({"scored": None, "kd": None}, r"recipe\.scored: missing.*add the table"),
    ({"kd": None}, r"recipe\.kd\.kl_weight: missing.*kl_weight = 0\.5"),
    ({"kd": {"kl_weight": 0.5}}, r"recipe\.kd\.target: missing.*target = 'bucket'"),
    (
        {"kd": {"kl_weight": 1.0, "target": "bucket", "rescored": RESCORED}},
        r"recipe\.kd\.rescored .*recipe\.kd\.kl_weight = 1\.0 .*lower kl_weight",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_recipes_that_it_cannot_follow_are_refused(changes, message):
    word = {"objective": "topk_kl", "scored": scored_table()}
    with pytest.raises(ConfigError, match=message):
        load_objective("topk_kl").refuse(recipe(**(word | changes)))
    load_objective("topk_kl").refuse(asked(rescored=RESCORED))


def test_another_store_than_asked_for_is_refused():
    made = load_objective("topk_kl").of(asked(rescored=RESCORED), KINDS)
    for key, value in (("topk", 64), ("tail_draws", 0)):
        with pytest.raises(
            LossError, match=rf"{key} = {value}, and recipe\.scored\.{key} = .*score it again"
        ):
            made.use_store(MANIFEST | {key: value})
    with pytest.raises(LossError, match=r"over scored_final, .*span_means are \{'reasoning': -2\.5\}"):
        made.use_store(MANIFEST | {"span_means": {"reasoning": -2.5}})
    _, batch = scored_batch(1)[0]
    with pytest.raises(LossError, match=r"span_means .* before the first step"):
        made.start([batch], {SCORED: 2}, None)


@pytest.mark.parametrize("field", ["teacher_ids", "teacher_tail", "teacher_draws", "teacher_label_logprob"])
def test_a_batch_without_a_field_or_of_another_width_is_refused_before_the_forward_pass(field):
    made = objective(target="mix", rescored=RESCORED)
    _, batch = scored_batch(1)[0]
    narrow = batch | {field: batch[field][..., :-1]}
    with pytest.raises(LossError, match=rf"{field} has shape .*, expected .* of the top-K store"):
        made.start([narrow], {SCORED: 2}, None)
    del batch[field]
    with pytest.raises(LossError, match=rf"tokens of scored_reasoning, scored_final and no {field}"):
        made.start([batch], {SCORED: 2}, None)
