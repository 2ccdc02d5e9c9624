"""Losses: chunked cross-entropy over a large vocabulary, and its reduction over spans."""
