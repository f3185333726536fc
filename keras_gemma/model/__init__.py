"""The model: hidden states from ids. Layers hold weights; free functions do the mathematics.

In the order of the data:

    embedding.py       ids to vectors
    decoder_block.py   both halves of a block, with their norms
    attention.py       the first half: who looks at whom
    feed_forward.py    the second, gated half
    normalization.py   RMS norm
    rope.py            rotary position embedding
    linear.py          a matrix
    matrix.py          the variables of a matrix, plain or quantized
    taps.py            places in a block where others may look, and replace
    initialization.py  what a matrix starts from
    cache.py           keys and values of the text so far
    head.py            hidden states to logits
    backbone.py        all blocks in a row
    named_weight.py    its weights by name, as files know them
    quantizable.py     what models with and without a head share when they are quantized
    calibration.py     what each matrix is multiplied with, on given texts
    lora.py            adapters' settings: which matrices, of what rank and scale
    low_rank.py        one product of low rank beside a matrix
    adapters.py        a model's adapters by name: made, chosen, merged
    adaptable.py       what models with and without a head share where they have adapters
    adaptable_backbone.py    what of it KerasHub calls otherwise
    losses.py          the loss of hidden states, in chunks
    training_step.py   `fit` without the logits of a whole batch
"""
