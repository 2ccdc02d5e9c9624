"""Exercises of the row generator: problems whose working and answer are computed, in seven languages."""
