"""The usual way to build such a data set, as a comparator: library renders, Megatron's class writes.

Every conversation is rendered by openai-harmony as a whole and once more message by message, labels are made
from the messages' lengths, and the three arrays go through `IndexedDatasetBuilder`.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import openai_harmony as oh

from trainer.contract.scaffold import DEFAULT_IDENTITY, DEFAULT_INSTRUCTIONS
from vpmoe_assets.harmony.tokenizer import load_harmony

KINDS: dict[str, Any] = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
SPANS = {"analysis": 1, "final": 2}
EOD, RETURN = 199_999, 200_002


def conversation(row: Mapping[str, str]) -> oh.Conversation:
    """Five messages as library objects."""
    system = (
        oh.SystemContent.new()
        .with_model_identity(DEFAULT_IDENTITY)
        .with_reasoning_effort(oh.ReasoningEffort.HIGH)
        .with_conversation_start_date("2026-01-01")
        .with_knowledge_cutoff("2024-06")
        .with_required_channels(["analysis", "commentary", "final"])
    )
    developer = oh.DeveloperContent.new().with_instructions(DEFAULT_INSTRUCTIONS)
    message = oh.Message.from_role_and_content
    return oh.Conversation.from_messages(
        [
            message(oh.Role.SYSTEM, system),
            message(oh.Role.DEVELOPER, developer),
            message(oh.Role.USER, row["query"]),
            message(oh.Role.ASSISTANT, row["synthetic_reasoning"]).with_channel("analysis"),
            message(oh.Role.ASSISTANT, row["synthetic_answer"]).with_channel("final"),
        ]
    )


def document(encoding: oh.HarmonyEncoding, row: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the three arrays of a row, label-aligned."""
    talk = conversation(row)
    config = oh.RenderConversationConfig(auto_drop_analysis=False)
    whole = encoding.render_conversation_for_training(talk, config=config)
    parts, span = [], []
    for message in talk.messages:
        ids = encoding.render(message)
        parts += ids
        span += [SPANS.get(message.channel or "", 0)] * len(ids)
    parts[-1] = RETURN
    if parts != whole:
        raise AssertionError("the two renderings differ")
    span = [*span[1:], 0, 0]
    return {"tokens": [*whole, EOD], "lossmask": [int(label > 0) for label in span], "span": span}


def build(rows: Sequence[Mapping[str, str]], output: Path, tokenizer_dir: Path, valid_fraction: float) -> int:
    """Write one shard per split; the number of tokens written."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoding = load_harmony(tokenizer_dir)
    threshold = int(valid_fraction * 2**64)
    builders: dict[tuple[str, str], Any] = {}
    tokens = 0
    for row in rows:
        number = int.from_bytes(blake2b(row["synth_id"].encode(), digest_size=8).digest(), "big")
        split = "valid" if number < threshold else "train"
        for kind, values in document(encoding, row).items():
            if (split, kind) not in builders:
                (output / split).mkdir(parents=True, exist_ok=True)
                path = str(output / split / f"shard_00_{kind}.bin")
                builders[split, kind] = IndexedDatasetBuilder(path, dtype=KINDS[kind])
            builders[split, kind].add_document(torch.tensor(values, dtype=torch.int32), [len(values)])
            tokens += len(values) if kind == "tokens" else 0
    for (split, kind), builder in builders.items():
        builder.finalize(str(output / split / f"shard_00_{kind}.idx"))
    return tokens
