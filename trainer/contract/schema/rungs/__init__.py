"""The ladder: one module a rung, named by the step that makes it; `ladder.py` says their order."""
