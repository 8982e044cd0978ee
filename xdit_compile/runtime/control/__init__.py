"""The control plane: ranks agree before a call and fail together."""
