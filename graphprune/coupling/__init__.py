"""What hangs together: a model is traced, and the axes of its tensors that must be cut together are unified."""
