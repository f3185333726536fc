"""GGUF files of llama.cpp.

layout.py       names of tensors, and settings that llama.cpp keeps in its source
header.py       metadata and positions of tensors, read as untrusted input
reader.py       sizes, vocabulary and weights of a model, one tensor at a time
plain_forms.py  quantized numbers of blocks, without rounding
writer.py       writes a model, its vocabulary and chat template to one file
"""
