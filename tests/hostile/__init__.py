"""Parsers of what comes from outside, held against what nobody well-meaning would write."""
