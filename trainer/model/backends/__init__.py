"""One backend a module, named by `training.backend`; imported when a model is built with it."""
