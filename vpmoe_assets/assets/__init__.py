"""The asset graph, one module per group; every asset goes through `vpmoe_assets.assets.produced`."""
