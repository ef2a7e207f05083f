"""One YAML file that describes a run."""
