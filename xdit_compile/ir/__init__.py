"""The vocabulary: layouts, meshes, programs, pytrees, guards, costs. Immutable values; no devices, no processes."""
