"""Running local programs on one rank, and what is kept from step to step."""
