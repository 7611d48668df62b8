"""Measures recounts and their alternatives: `python -m bench --help`."""
