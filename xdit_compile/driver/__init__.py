"""From a model and a call to what this rank runs: compile, cache, run, stand in for the model, read its weights."""
