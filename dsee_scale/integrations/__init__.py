"""Where others' pipelines meet this package."""
