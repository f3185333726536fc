"""Text to text in a TensorFlow graph; alone in `export/` to import TensorFlow.

build.py     writes the SavedModel
model.py     its functions
checks.py    what a call is checked for
text.py      strings to ids and back
chat.py      conversations to ids
reading.py   ids into the model
decoding.py  token after token
scoring.py   how likely texts are
"""
