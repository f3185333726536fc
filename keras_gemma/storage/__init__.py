"""Presets and other model files: finding, downloading, reading and writing them.

presets.py           load an object from a preset's folder, save an object into one
arguments.py         arguments of `from_preset`, checked before a preset is looked for
format_interface.py  interface of a format
formats.py           list of all formats
tensor_streaming.py  tensors in files compared with a model's weights, then streamed into them
sharding.py          sizes of weights, and how they are divided among files
files.py             JSON, untrusted file names, and atomic replacement of a folder

hub/                 names and handles to folders; downloads and uploads
keras_preset/        KerasHub's folder
hugging_face/        Hugging Face's folder
adapters/            LoRA adapters of PEFT and KerasHub
gguf/                llama.cpp's .gguf file
orbax/               DeepMind's folder for JAX
"""

from keras_gemma.storage.hub.locate import resolve
from keras_gemma.storage.presets import load, save

__all__ = ["load", "resolve", "save"]
