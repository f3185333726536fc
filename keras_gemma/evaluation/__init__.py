"""Benchmarks of the model cards, on lm-evaluation-harness."""
