"""Handing functions of a program to inductor or onediff."""
