"""What exists only to repeat the paper; not part of the package."""
