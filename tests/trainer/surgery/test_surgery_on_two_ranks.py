"""Depth expansion and upcycling keep the logits bit for bit on two ranks too, tensor- and expert-parallel."""

import pytest

from tests.ranks import run_ranks
from tests.trainer.surgery.surgery_cases import (
    VOCAB,
    convert_job,
    expand_recipe,
    morphed,
    payload,
    publish_as,
    routed,
    run,
    upcycle_recipe,
)
from tests.trainer.surgery.surgery_ranks import compared
from trainer.contract.schema.base import plain

LAYOUTS = {"expand": [(2, 1)], "upcycle": [(2, 1), (2, 2), (1, 2)]}
"""Tensor- and expert-parallel sizes of the two ranks."""


@pytest.mark.slow
def test_logits_are_bit_identical_on_two_ranks(tmp_path):
    cases = []
    for dtype in ("fp32", "bf16"):
        source = publish_as(morphed(num_layers=4), tmp_path / f"parent_{dtype}", dtype)
        recipes = {"expand": expand_recipe(4, 8), "upcycle": upcycle_recipe()}
        for step, recipe in recipes.items():
            typed = recipe | {"dtype": dtype, "parent_dtype": dtype}
            job = convert_job(tmp_path, typed, f"{step}_{dtype}", parent=source)
            assert run(job) == 0
            target = morphed(num_layers=8) if step == "expand" else routed()
            cases += [
                {
                    "name": f"{step} {dtype} tp {tp} ep {ep}",
                    "tp": tp,
                    "ep": ep,
                    "dtype": dtype,
                    "parent": {"path": str(source), "architecture": plain(morphed(num_layers=4))},
                    "result": {"path": str(payload(job)), "architecture": plain(target)},
                }
                for tp, ep in LAYOUTS[step]
            ]
    for found in run_ranks(2, compared, cases):
        assert [case["name"] for case in found] == [case["name"] for case in cases]
        for case, asked in zip(found, cases, strict=True):
            assert case["equal"], case
            assert case["largest"] > 0.5
            assert case["width"] == VOCAB // asked["tp"]
