"""How good: metrics, the model on val and then once on test, a shipped file on labelled images."""
