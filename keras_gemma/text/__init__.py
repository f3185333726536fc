"""Text to token ids and back. Above this folder and the applications, only ids are known.

A table of contents:

    tokenizer.py      the layer: strings to ids, ids to strings
    pieces.py         the vocabulary itself: control tokens in a text, or none
    preprocessor.py   ids to what models read: start and end tokens, padding, masks, labels
    batches.py        strings on their way into `fit`, in every container
    vocabulary.py     a new SentencePiece vocabulary with Gemma's special ids
    stream.py         text as it is made, token by token
    chat.py           messages as Gemma's turns
    chat_template.py  Gemma's turns in Jinja, for models that leave this package
    reading.py        what people hand over as texts or ids
"""

from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.vocabulary import train_vocabulary

__all__ = ["GemmaCausalLMPreprocessor", "GemmaPreprocessor", "GemmaTokenizer", "train_vocabulary"]
