"""One job of the trainer: its start, its ranks, its work directory, its end."""
