"""The asset graph, one module per group; every asset goes through :mod:`vpmoe_assets.assets.making`."""
