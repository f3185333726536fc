"""The model: token ids to hidden states. Layers hold weights; functions do the mathematics.

In the order of the data:

    embedding.py       ids to vectors
    transformer.py     forward pass: all blocks in order
    block.py           one block as a function
    decoder_block.py   layer with the weights of a block
    attention.py       attention half of a block
    feed_forward.py    feed-forward half of a block
    normalization.py   RMS norm
    rope.py            rotary position embedding
    linear.py          layer with a matrix and its LoRA updates
    matrix.py          base class of layers with a matrix, plain or quantized
    hooks.py           hook points of a block
    cache.py           KV cache
    head.py            hidden states to logits
    backbone.py        GemmaBackbone
    weights.py         weights by name, as in files
    trainable.py       base class of backbone and causal language model
    quantize.py        quantization of a model in place
"""
