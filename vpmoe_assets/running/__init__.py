"""A run started from the terminal: Dagster executes it, people can read along."""
