"""SYNTH rows to Harmony conversations to training shards: a pure library, no Dagster, no torch.

Read it in this order: `rows` (parquet in), `conversation` (five messages), `render` (tokens and
labels), `truncate`, `split`, `indexed` (files out), `kd` (one shard), `build` (all of it).
"""
