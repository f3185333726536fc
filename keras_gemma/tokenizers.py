"""`keras_hub.tokenizers`, as far as it is Gemma."""

from keras_gemma.text.tokenizer import GemmaTokenizer

Tokenizer = GemmaTokenizer

__all__ = ["GemmaTokenizer", "Tokenizer"]
