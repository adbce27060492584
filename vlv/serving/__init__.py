"""Models-from-code scripts: MLflow stores them with a registered version and runs them to serve it."""
