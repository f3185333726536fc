"""How fast this machine runs a model, beside what its memory and its arithmetic allow.

Knows models by `generate` alone, and no command line: `keras-gemma bench` prints what stands here.

    arithmetic.py     bytes and operations that the work cannot do without
    machine.py        what the machine reaches: reading, and multiplying square matrices
    memory.py         what this process holds, and held at most
    random_model.py   a model of any size with random weights, made cheaply
    generation.py     load, first call, prompt, token after token
    kernels.py        a few rows times each matrix of a model, in each form
"""
