"""Evaluation: metrics, the trained model on val and test, exported files on labelled images."""
