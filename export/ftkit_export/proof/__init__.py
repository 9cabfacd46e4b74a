"""Evidence: parity, golden vectors, confidence intervals, int8 decision, regression gate."""
