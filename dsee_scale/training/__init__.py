"""The run: recipe, data, metrics, and tune -> prune -> retune -> export on the Hugging Face Trainer."""
