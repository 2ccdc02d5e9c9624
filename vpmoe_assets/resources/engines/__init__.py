"""What runs the shards of a step, one module each; see `vpmoe_assets.resources.shards`."""
