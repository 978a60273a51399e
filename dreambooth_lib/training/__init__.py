"""Train a run, validate it, save its checkpoints and sample from it."""
