"""Generation: ids from ids. Knows no text.

In the order of the work:

    generator.py  ragged prompts, in shapes that compile once
    prefill.py    the prompt: its keys and values, and its last hidden state
    decode.py     token after token, from there
    samplers/     the choice of the next token, one rule a file
    noise.py      random numbers that are the same on every backend
"""
