"""The Megatron-based trainer of vpMoE: `python -m trainer <command>`; it knows nothing of Dagster."""
