"""The commands of `vpmoe`, one module for each subject."""
