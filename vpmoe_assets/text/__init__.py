"""Plain text for healing runs: documents to token shards."""
