"""GGUF files for llama.cpp.

writer.py  writes a model, its vocabulary and chat template to one file
"""
