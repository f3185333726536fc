"""Gemma on Keras 3: the public names of the package.

`import keras_gemma as keras_hub` gives a KerasHub notebook the Gemma names it uses.

All names are imported with the package, so that Keras can find the classes of saved models. The
command `keras-gemma` (`python -m keras_gemma`) is an exception: it imports what it needs itself, so
that `--help` does not load Keras.
"""

from keras_gemma.backend_choice import is_command, use_backend
from keras_gemma.config import GemmaConfig
from keras_gemma.version import __version__

if not is_command():
    use_backend()  # before anything below imports Keras

    from keras_gemma import models, quantization, samplers, scoring, tokenizers, training
    from keras_gemma.causal_lm.chat import Chat
    from keras_gemma.causal_lm.completion import Completion
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.causal_lm.settings import GenerationSettings
    from keras_gemma.interop import from_keras_hub, to_keras_hub
    from keras_gemma.model.backbone import GemmaBackbone
    from keras_gemma.quantization import QuantizationConfig
    from keras_gemma.storage.hub.upload import upload_preset
    from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
    from keras_gemma.text.tokenizer import GemmaTokenizer

__all__ = [
    "Chat",
    "Completion",
    "GemmaBackbone",
    "GemmaCausalLM",
    "GemmaCausalLMPreprocessor",
    "GemmaConfig",
    "GemmaPreprocessor",
    "GemmaTokenizer",
    "GenerationSettings",
    "QuantizationConfig",
    "__version__",
    "from_keras_hub",
    "models",
    "quantization",
    "samplers",
    "scoring",
    "to_keras_hub",
    "tokenizers",
    "training",
    "upload_preset",
]
