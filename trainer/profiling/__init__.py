"""`python -m trainer profile`: where the time and the memory of a training step go."""
