"""Conversion of models and samplers to KerasHub's and back, in memory.

keras_hub_models.py    tasks, backbones, preprocessors, tokenizers
keras_hub_samplers.py  samplers
"""

from keras_gemma.interop.keras_hub_models import from_keras_hub, to_keras_hub

__all__ = ["from_keras_hub", "to_keras_hub"]
