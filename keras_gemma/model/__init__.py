"""The model: hidden states from ids. Layers hold weights; free functions do the mathematics.

In the order of the data:

    embedding.py       ids to vectors
    transformer.py     the forward pass: all blocks in order
    block.py           one block as a function
    decoder_block.py   the layer that holds the weights of a block
    attention.py       the first half of a block
    feed_forward.py    the second, gated half
    normalization.py   RMS norm
    rope.py            rotary position embedding
    linear.py          a matrix
    matrix.py          the variables of a matrix, plain or quantized
    hooks.py           hook points in a block
    initialization.py  initial values of a matrix
    cache.py           keys and values of the text so far
    head.py            hidden states to logits
    backbone.py        GemmaBackbone
    weights.py         weights by name, as files know them
    trainable.py       base class of backbone and causal language model
    quantize.py        quantization of a model in place
"""
