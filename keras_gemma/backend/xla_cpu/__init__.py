"""Kernels for XLA on CPU, shared by JAX and TensorFlow. They know only `keras.ops`.

one_query.py      attention of one query per sequence
xla_quantized.py  int8 and int4 weights
"""
