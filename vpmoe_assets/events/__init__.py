"""What Dagster is told of an artifact, by the run that made it or afterwards."""
