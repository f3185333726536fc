"""Scoring: what the model thinks of a text that is there already.

score.py  logits or losses of every position, with a hook at every layer
"""
