"""The command line: its commands and their flags."""
