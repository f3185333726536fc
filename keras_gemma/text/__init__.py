"""Text to token ids and back. Above this folder and the applications, only ids are known."""

# The vocabulary: strings to ids, ids to strings.
# Ids to what models read: start and end tokens, padding, masks, labels.
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor as GemmaCausalLMPreprocessor
from keras_gemma.text.preprocessor import GemmaPreprocessor as GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer as GemmaTokenizer

# A new SentencePiece vocabulary with Gemma's special ids.
from keras_gemma.text.vocabulary import train_vocabulary as train_vocabulary
