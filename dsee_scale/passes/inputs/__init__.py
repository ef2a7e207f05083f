"""What layers read of the calibration batches: which tokens count, and hooks that hand out each layer's inputs."""
