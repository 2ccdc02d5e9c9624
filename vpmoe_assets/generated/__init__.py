"""Rows written by this project: exercises whose working and answer are computed."""
