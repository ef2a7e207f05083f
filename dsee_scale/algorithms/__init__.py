"""Pure algorithms: tensors in, tensors or records out."""
