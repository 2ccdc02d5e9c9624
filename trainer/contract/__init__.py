"""What orchestrator and trainer agree on: schemas, words, file formats. Without torch, without Dagster."""
