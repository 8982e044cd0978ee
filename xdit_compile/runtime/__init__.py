"""Processes: starting them, their groups, agreement and failure, executing programs, results that arrive later."""
