"""Gemma counterpart of `keras_hub.models`."""

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.gemma3 import (
    Gemma3Backbone,
    Gemma3CausalLM,
    Gemma3CausalLMPreprocessor,
    Gemma3Tokenizer,
)
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.shield_gemma import ShieldGemma
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer

# KerasHub's base classes, whose `from_preset` picks the class. Here it is always Gemma's.
Backbone = GemmaBackbone
CausalLM = GemmaCausalLM
CausalLMPreprocessor = GemmaCausalLMPreprocessor
Preprocessor = GemmaCausalLMPreprocessor
Tokenizer = GemmaTokenizer

__all__ = [
    "Backbone",
    "CausalLM",
    "CausalLMPreprocessor",
    "Gemma3Backbone",
    "Gemma3CausalLM",
    "Gemma3CausalLMPreprocessor",
    "Gemma3Tokenizer",
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaPreprocessor",
    "GemmaTokenizer",
    "Preprocessor",
    "ShieldGemma",
    "Tokenizer",
]
