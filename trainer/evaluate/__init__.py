"""What a checkpoint can do: CORE-8, perplexity, exact copying, format validity, router health."""
