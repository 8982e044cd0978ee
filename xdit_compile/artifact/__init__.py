"""Compiled parallel models as files: written once, started anywhere without the model's code."""
