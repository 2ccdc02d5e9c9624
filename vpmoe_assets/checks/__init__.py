"""Checks of what an asset made, run before it is published and kept in its record."""
