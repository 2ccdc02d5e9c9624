"""Conversions between the rungs of the ladder: one step each, streamed tensor by tensor, then checked."""
