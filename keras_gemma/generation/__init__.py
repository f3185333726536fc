"""Generation: ids from ids. Knows no text.

noise.py      random numbers that are the same on every backend
samplers/     the choice of the next token, one rule a file
prefill.py    the prompt: its keys and values, and its last logits
decode.py     token after token, from there
generator.py  both, for ragged prompts, in shapes that compile once
"""
