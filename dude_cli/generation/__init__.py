"""Text from a run, an adapter or a model."""
