"""The model: hidden states from ids. Layers hold weights; free functions do the mathematics.

normalization.py   RMS norm
rope.py            rotary position embedding
linear.py          a matrix
embedding.py       ids to vectors, and vectors to logits
attention.py       who looks at whom
feed_forward.py    the gated half of a block
decoder_block.py   both halves, with their norms
cache.py           keys and values of the text so far
backbone.py        all blocks in a row
"""
