"""Evidence: parity, golden vectors, intervals, the int8 decision, the regression gate."""
