"""Gemma counterpart of `keras_hub.tokenizers`."""

from keras_gemma.gemma3 import Gemma3Tokenizer
from keras_gemma.text.tokenizer import GemmaTokenizer

Tokenizer = GemmaTokenizer

__all__ = ["Gemma3Tokenizer", "GemmaTokenizer", "Tokenizer"]
