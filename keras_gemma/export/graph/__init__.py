"""Functions of a SavedModel from strings to strings, as TensorFlow graphs.

model.py     the weights, and the functions with their inputs
settings.py  generation settings of a call, and checks of inputs
text.py      strings to token ids and back
chat.py      conversations to token ids
prefill.py   prompts into a KV cache
decoding.py  the decoding loop, with stop strings
scoring.py   log-probabilities of texts
"""
