"""Low-rank adapters (LoRA) of a backbone.

config.py               settings of an adapter: target matrices, rank and scale
low_rank.py             the product of one adapter and its matrix
adapters.py             the adapters of a model by name: add, activate, merge, delete
adaptable.py            LoRA methods of both models
adaptable_backbone.py   LoRA methods of the backbone with KerasHub's arguments and files
"""
