"""Which spec is best for a model on a machine: what each would cost in seconds, and why."""
