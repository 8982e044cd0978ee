"""What `benchmarks/gpu.py` measures, one subject in each file."""
