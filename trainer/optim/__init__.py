"""The optimizer: NorMuon with Polar Express for matrices, AdamW for the rest, sharded by whole matrices."""
