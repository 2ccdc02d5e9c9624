"""What every artifact is and what it came from: digests, records, the store, the index. Pure, no Dagster."""
