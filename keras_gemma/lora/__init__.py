"""LoRA adapters.

config.py     settings of an adapter and their validation
low_rank.py   low-rank update of one matrix
adapters.py   adapters of a backbone
"""
