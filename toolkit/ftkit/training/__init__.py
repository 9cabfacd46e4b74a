"""From images to a run: stages, epochs, steps, checkpoints; the feature cache and what reads it."""
