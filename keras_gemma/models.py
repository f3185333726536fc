"""`keras_hub.models`, as far as it is Gemma."""

from keras_gemma.causal_lm import GemmaCausalLM
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer

__all__ = [
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaPreprocessor",
    "GemmaTokenizer",
]
