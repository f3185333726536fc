"""Presets: folders that hold a model's description, vocabulary and weights.

locate.py              from a name, a handle or a path to a folder
downloads.py           from a handle to a folder, by the hubs' own clients
presets.py             from a folder to an object, and from an object to a folder
arguments.py           what `from_preset` may be told
keras_preset.py        KerasHub's folder, read
keras_writer.py        KerasHub's folder, written
keras_layout.py        KerasHub's names, paths and shapes, which both of them follow
hugging_face.py        Hugging Face's folder, read
hugging_face_writer.py Hugging Face's folder, written
hugging_face_layout.py its names and config.json, both ways
tokenizer_json.py      Hugging Face's tokenizer.json and SentencePiece, both ways
formats.py             which files belong to which format
safetensors_reader.py  tensors in a safetensors file
peft.py                peft's folder with an adapter, both ways
keras_hub_lora.py      KerasHub's file with an adapter, both ways
gguf_writer.py         one .gguf file for llama.cpp, written
savable.py             both of these writers, as methods of a model
upload.py              a folder sent to Kaggle or Hugging Face
checkpoint.py          tensors in files against the weights of a model: compared, then streamed
sharding.py            how large weights are, and how they are divided among files
files.py               JSON, file names from untrusted indices, and a folder replaced as a whole
progress.py            a bar for work that takes long
"""

from keras_gemma.storage.hub.locate import resolve
from keras_gemma.storage.presets import load, save

__all__ = ["load", "resolve", "save"]
