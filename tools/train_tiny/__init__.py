"""Trains the bundled model `firebox-tiny`; `python -m tools.train_tiny` does every stage (README.md here)."""
