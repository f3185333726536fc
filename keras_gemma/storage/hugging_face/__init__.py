"""Hugging Face's checkpoint folders.

layout.py           names of tensors and config.json, both ways
reader.py           reads a folder
writer.py           writes a folder
safetensors.py      reads tensors of a safetensors file
tokenizer_json.py   tokenizer.json to SentencePiece and back
"""
