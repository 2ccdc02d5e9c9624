"""The command line of one `synth_kd_v1` shard, for engines that schedule shards themselves."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vpmoe_assets.harmony.build import DEFAULT_SHARDS, synth_worker
from vpmoe_assets.harmony.conversation import Scaffold
from vpmoe_assets.harmony.kd_config import KdConfig
from vpmoe_assets.harmony.pool import Progress


def parser() -> argparse.ArgumentParser:
    """Options as of `vpmoe data build`, with the scaffold strings and the shard to build."""
    default, scaffold = KdConfig(), Scaffold()
    options = argparse.ArgumentParser(
        prog="python -m vpmoe_assets.harmony.kd",
        description="Build one shard of synth_kd_v1 from SYNTH-shaped parquet, or skip it if it is finished.",
    )
    add = options.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help="parquet files, in order")
    add("--work", type=Path, required=True, help="work directory; .NAME.building beside an output NAME")
    add("--tokenizer", type=Path, required=True, help="payload directory of o200k_tokenizer")
    add("--shard", type=int, required=True, help="number of the shard, from 0")
    add("--of", type=int, default=DEFAULT_SHARDS, help="number of shards (default %(default)s)")
    add("--seq-len", type=int, default=default.seq_len, help="default %(default)s")
    add("--valid-fraction", type=float, default=default.valid_fraction, help="default %(default)s")
    add("--max-rows", type=int, default=default.max_rows, help="of all shards together; -1 is all")
    add("--pack-block", type=int, default=default.pack_block, help="default %(default)s")
    add("--model-identity", default=scaffold.model_identity)
    add("--reasoning-effort", default=scaffold.reasoning_effort)
    add("--conversation-start-date", default=scaffold.conversation_start_date)
    add("--knowledge-cutoff", default=scaffold.knowledge_cutoff)
    instructions = options.add_mutually_exclusive_group()
    instructions.add_argument("--instructions", default=scaffold.instructions)
    instructions.add_argument("--omit-developer", action="store_true", help="no developer message")
    return options


def main(arguments: Sequence[str]) -> int:
    """Build the shard and print its entry as JSON; 1 and a message on standard error if that fails."""
    options = parser().parse_args(arguments)
    try:
        scaffold = Scaffold(
            options.model_identity,
            options.reasoning_effort,
            options.conversation_start_date,
            options.knowledge_cutoff,
            None if options.omit_developer else options.instructions,
        )
        config = KdConfig(options.seq_len, options.valid_fraction, options.max_rows, options.pack_block)
        worker = synth_worker(
            options.input, options.work, options.tokenizer, config, scaffold=scaffold, num_shards=options.of
        )
        if not 0 <= options.shard < options.of:
            raise ValueError(f"--shard must lie in [0, {options.of}), got {options.shard}")
        label = f"shard {options.shard:02d} of {options.of}"
        with Progress(label, worker.sources[options.shard].rows) as progress:
            entry = worker(options.shard, progress.advance)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(entry))
    return 0
