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
    penalties.py    penalties of tokens that a text already has
    token_mask.py   masks of allowed tokens
    samplers/       choice of the next token, one rule a file
    strategies/     beam search, contrastive search, speculative decoding

Continuous batching, for requests that come at any time:

    engine_request.py  a request, and its outputs
    request_handle.py  a request in the engine: its outputs in threads and event loops
    engine.py          queue, thread, start and end
    scheduler.py       turns: prompts in progress and slots
    engine_job.py      what the scheduler knows of a request
    engine_model.py    what it asks of the model
    engine_stats.py    what it counts
    slots.py           rows of one decode state, filled and freed one at a time
    engine_step.py     one decode step of rows with settings of their own
    prefix_store.py    keys and values of prompts that were read before
"""
