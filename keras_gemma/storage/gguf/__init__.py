"""GGUF files, as llama.cpp reads them.

writer.py   writes a model to one file
"""
