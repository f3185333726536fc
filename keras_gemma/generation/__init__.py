"""Generation: token ids to token ids. Knows no text.

In the order of the work:

    request.py      a request, a prefix cache, and the output of each sequence
    memory.py       memory estimate of a request
    generate.py     entry points; picks the strategy that the sampler declares
    programs.py     compiled programs of one backbone, and prefill with them
    session.py      one batch: prefill, then decode
    prefill.py      one chunk of a prompt; sizes of chunks and caches
    decode.py       one decode step
    stopping.py     stop tokens
    samplers/       choice of the next token, one rule a file
    strategies/     beam search, contrastive search, speculative decoding
"""
