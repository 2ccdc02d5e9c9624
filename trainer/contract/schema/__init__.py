"""`configs/*.toml` and `job.json`: typed, frozen, unknown keys refused. Nothing in here computes bytes."""
