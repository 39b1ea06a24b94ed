"""Commands: `python -m Training.tools.NAME`."""
