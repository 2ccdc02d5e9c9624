"""Kinds of samples that a training run mixes: what the data bring and an objective weighs."""

CONVERSATIONS = "conversations"
TEXT = "text"
