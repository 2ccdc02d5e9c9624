"""Token by token: cache, sampling, generation, prompts of conversations."""
