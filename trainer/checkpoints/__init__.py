"""Checkpoints: resume checkpoints, published weights, where they came from."""
