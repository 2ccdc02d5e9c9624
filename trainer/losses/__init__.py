"""One objective a module, named by a recipe's `objective`; imported when a run trains on it."""
