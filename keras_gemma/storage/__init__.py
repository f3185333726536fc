"""Presets: folders that hold a model's description, vocabulary and weights.

hub/                 names, handles, downloads, uploads
keras_preset/        KerasHub's folders
hugging_face/        Hugging Face's folders
adapters/            LoRA adapters in the formats of peft and KerasHub
gguf/                GGUF files for llama.cpp
presets.py           from a folder to an object, and from an object to a folder
arguments.py         arguments of `from_preset`
formats.py           files of each format
savable.py           methods of a model that write other formats
tensor_streaming.py  tensors in files compared with the weights of a model, then streamed
sharding.py          how weights are divided among files
files.py             JSON, file names from untrusted indices, atomic replacement of a folder
"""

from keras_gemma.storage.hub.locate import resolve
from keras_gemma.storage.presets import load, save

__all__ = ["load", "resolve", "save"]
