"""Training: stages, epochs and steps, checkpoints, and the feature cache with its loaders."""
