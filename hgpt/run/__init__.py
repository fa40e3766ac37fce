"""A training run: settings, engines, checkpoints, reporting."""
