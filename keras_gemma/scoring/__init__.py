"""Scoring: what the model thinks of a text that is there already: `score.py`."""
