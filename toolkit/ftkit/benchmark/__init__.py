"""Budgets, the history of latencies, measuring over ssh, the pytest plugin."""
