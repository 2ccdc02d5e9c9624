"""Health of a checkpoint's routers on a fixed batch: the first held-out conversations, one a row."""

import torch

from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.data.indexed import SpanDocuments
from trainer.evaluate.megatron import MegatronModel
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.ppl import CONVERSATION_INPUT
from trainer.evaluate.suite import SuiteContext, SuiteResult
from trainer.model.router_metrics import router_metrics

BATCH_TOKENS = 8192
"""Whole conversations with at least this many tokens together, or the whole held-out split."""


def run(model: LanguageModel, recipe: EvaluateRecipe, context: SuiteContext) -> SuiteResult:
    """Count which experts the batch is sent to, and take the balancing loss on it.

    Rows are run one at a time, so the numbers do not depend on batching; padding does not occur.

    Raises:
        ValueError: The checkpoint has no router.
    """
    if not isinstance(model, MegatronModel) or not model.module.moe_layer_numbers:
        raise ValueError(f"{model.name} has no router: this suite is for MoE checkpoints")
    documents = SpanDocuments(context.input(CONVERSATION_INPUT, "router health"), "valid")
    network = model.module
    coefficient = network.config.moe_aux_loss_coeff
    balance, tokens, rows = 0.0, 0, 0
    network.reset_router_counts()
    network.train()  # routers count, and take their loss, in training passes only; there is no dropout
    try:
        with torch.enable_grad():  # what else they ask for; no parameter wants a gradient, so nothing is kept
            while tokens < BATCH_TOKENS and rows < len(documents):
                context.check_stop()
                ids = torch.from_numpy(documents[rows].tokens[: recipe.max_len]).long()[None].to(model.device)
                places = torch.arange(ids.shape[1], device=model.device)[None]
                network.forward_hidden(ids, places, torch.zeros_like(ids))
                balance += float(network.pop_aux_loss())
                tokens += ids.shape[1]
                rows += 1
    finally:
        network.eval()
    counts = network.router_counts().cpu().numpy()
    network.reset_router_counts()
    biases = network.expert_biases()
    numbers = network.moe_layer_numbers
    health = router_metrics(counts, None if biases is None else biases.cpu().numpy(), numbers, per_layer=True)
    aggregate = {name: value for name, value in health.items() if name.startswith("moe/router_agg/")}
    if coefficient:
        # 1 when every row loads the experts evenly, summed over layers and rows by the network
        aggregate["moe/router_agg/mean_balance_loss"] = balance / (coefficient * len(numbers) * rows)
    layers = [
        {
            "layer": number,
            **{
                name.rsplit("/", 1)[1]: value
                for name, value in health.items()
                if name.startswith(f"moe/router/layer_{number}/")
            },
        }
        for number in numbers
    ]
    report = {
        "tokens": tokens,
        "conversations": rows,
        "aggregate": {name.rsplit("/", 1)[1]: value for name, value in aggregate.items()},
        "layers": layers,
    }
    return SuiteResult(metrics=aggregate, report=report)
