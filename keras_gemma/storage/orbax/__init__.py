"""Orbax checkpoints of DeepMind's JAX package `gemma`.

layout.py  file names, names and shapes of arrays, settings of the published models
arrays.py  opens the arrays of a checkpoint
reader.py  reads a folder
writer.py  writes a folder
"""

from keras_gemma.storage.format_interface import Format
from keras_gemma.storage.orbax import layout, reader, writer

FORMAT = Format(
    title="Orbax checkpoint",
    signs=f"{layout.MANIFEST} or {layout.METADATA}",
    library=None,
    files=layout.FILES,
    default_shard_size="2GB",
    requires_config=False,
    required_arguments=layout.REQUIRED_ARGUMENTS,
    matches=reader.matches,
    read_backbone=reader.read_backbone,
    read_tokenizer=reader.read_tokenizer,
    tensor_specs=reader.tensor_specs,
    open_weights=reader.open_weights,
    write=writer.write,
)
