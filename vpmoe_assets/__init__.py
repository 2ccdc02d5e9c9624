"""The Dagster code location of vpMoE: an asset graph that knows what every file it made came from."""
