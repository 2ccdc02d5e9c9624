"""Pure library: the two donors of the ladder as Hugging Face directories, seeded or downloaded. No torch."""
