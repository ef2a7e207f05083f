"""Metrics, generation, and the check of what was exported."""
