"""Hugging Face's checkpoint folder.

layout.py          file names, tensor names, config.json in both directions
reader.py          reads a folder
writer.py          writes a folder
safetensors.py     locates the tensors in a safetensors file
tokenizer_json.py  converts tokenizer.json to a SentencePiece model and back
"""
