"""From a run to a sealed bundle: variants, evidence, gates."""
