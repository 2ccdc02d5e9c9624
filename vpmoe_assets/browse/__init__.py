"""Read-only pages over a store: served on this machine, or written as files."""
