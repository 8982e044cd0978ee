"""Whole diffusers pipelines: what their components are for, and how each is made parallel."""
