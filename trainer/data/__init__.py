"""What the trainer reads: indexed shards, packing, samples, and a sampler with two integers of state."""
