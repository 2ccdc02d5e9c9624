"""What the orchestrator says of each rung: one module a step, found by the word of its recipe."""
