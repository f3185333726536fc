"""Speed and memory of a model, compared with the limits of the machine.

Knows nothing about the command line: `keras-gemma bench` prints the results.

    arithmetic.py     bytes and operations that generation needs at least
    machine.py        matrix throughput of the machine
    memory.py         current and peak memory of this process
    random_model.py   model of any size with random weights
    generation.py     loading, first call, prefill and decoding of a model
"""
