"""GGUF files for llama.cpp.

layout.py  names of tensors, and settings that llama.cpp keeps in its source
header.py  metadata and positions of tensors, read as untrusted input
reader.py  reads a model and its vocabulary, and dequantizes one tensor at a time
writer.py  writes a model, its vocabulary and chat template to one file
"""
