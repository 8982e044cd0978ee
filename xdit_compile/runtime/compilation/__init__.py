"""Handing functions of a program to torch.compile or onediff."""
