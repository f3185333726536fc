"""Gemma counterpart of `keras_hub.tokenizers`."""

from keras_gemma.text.tokenizer import GemmaTokenizer

Tokenizer = GemmaTokenizer

__all__ = ["GemmaTokenizer", "Tokenizer"]
