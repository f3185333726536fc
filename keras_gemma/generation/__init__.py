"""Generation: ids from ids. Knows no text.

In the order of the work:

    request.py      what is asked: prompts, settings; and what is given
    memory.py       what that will take
    generator.py    ragged prompts, in shapes that compile once; a run in progress
    prefill.py      the prompt in chunks: its keys and values, and its last hidden state
    decode.py       token after token, from there
    feed.py         tokens into the model, for both
    samplers/       the choice of the next token, one rule a file
    noise.py        random numbers that are the same on every backend

Runs of another kind:

    beam.py         the best texts of each prompt, side by side
    contrastive.py  a likely token that says something new
    speculative.py  tokens that are guessed, and read together
    guessing.py     who guesses them
    judging.py      which of them become the text
"""
