"""Presets: folders that hold a model's description, vocabulary and weights.

    published.py     preset names, and where their weights are published
    locate.py        from a name, a handle or a path to a folder, downloaded if need be
    presets.py       from a folder to an object, and from an object to a folder
    keras_preset.py  KerasHub's folder, read
    keras_writer.py  KerasHub's folder, written
    keras_layout.py  KerasHub's names, paths and shapes, which both of them follow
    hugging_face.py  Hugging Face's folder, read
    checkpoint.py    tensors in files against the weights of a model: compared, then streamed
    files.py         JSON, file names from untrusted indices, and a folder replaced as a whole

Importing this package gives `from_preset` and `save_to_preset` their work to do.
"""

from keras_gemma.presettable import Presettable
from keras_gemma.storage.locate import builtin_names, resolve
from keras_gemma.storage.presets import load, save

__all__ = ["builtin_names", "load", "resolve", "save"]

Presettable._load = staticmethod(load)
Presettable._save = staticmethod(save)
