"""Names of the forward pass that the programs of generation share."""

from keras_gemma.model.transformer import EAGER as AS_THEY_ARE
from keras_gemma.model.transformer import BlockFunctions as Parts
from keras_gemma.model.transformer import forward_with_cache as feed

__all__ = ["AS_THEY_ARE", "Parts", "feed"]
