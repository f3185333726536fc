"""GGUF files of llama.cpp.

header.py       metadata and positions of tensors
layout.py       names of tensors
reader.py       sizes, vocabulary and weights of a model
plain_forms.py  quantized numbers of blocks, without rounding
writer.py       writes a model, its vocabulary and chat template to one file
"""
