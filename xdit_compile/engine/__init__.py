"""A handle on many devices from one program: workers, what travels between, and what becomes of a failure."""
