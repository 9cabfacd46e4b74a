"""report.html of runs and bundles, its charts, and the model card."""
