"""Find the model that fits the device: candidates, scored out of fold and timed, and their front."""
