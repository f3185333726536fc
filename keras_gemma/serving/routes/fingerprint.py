"""Fingerprint of the software, which OpenAI's responses have."""

import keras

from keras_gemma.version import __version__

FINGERPRINT = f"keras-gemma-{__version__}-{keras.config.backend()}"
"""Version and backend. The same seed gives the same text as long as they do not change."""
