"""Conversion between text and token ids. Model and generation only know ids.

tokenizer.py      tokenizer layer
pieces.py         SentencePiece vocabulary, with and without control tokens
preprocessor.py   model inputs: start and end tokens, padding, masks, labels
batches.py        strings as inputs of `fit`, `evaluate` and `predict`
vocabulary.py     training of a SentencePiece vocabulary with Gemma's special ids
stream.py         incremental detokenization
chat.py           messages as Gemma's turns
chat_template.py  Jinja chat template for exported models
grammar.py        structured output: JSON schemas, regular expressions and grammars as masks
tools.py          formats of tools by name
tool_calls.py     tools, calls and results: checks and types
gemma3_tools.py   tools of Gemma 3
function_gemma.py tools of FunctionGemma
inputs.py         texts and ids in all containers that users pass
"""

from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.vocabulary import train_vocabulary

__all__ = ["GemmaCausalLMPreprocessor", "GemmaPreprocessor", "GemmaTokenizer", "train_vocabulary"]
