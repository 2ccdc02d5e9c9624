"""The `count` command."""
