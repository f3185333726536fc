"""KerasHub's preset folder.

layout.py  file names, registered names, H5 paths and shapes
reader.py  reads a folder
writer.py  writes a folder
"""

from keras_gemma.storage.format_interface import Format
from keras_gemma.storage.keras_preset import layout, reader, writer

FORMAT = Format(
    title="Keras preset",
    signs=f"`registered_name` or `class_name` in {layout.CONFIG}, or {layout.VOCABULARY}",
    library="keras-hub",
    files=layout.FILES,
    default_shard_size="10GB",
    matches=reader.matches,
    read_backbone=reader.read_backbone,
    read_tokenizer=reader.read_tokenizer,
    read_preprocessor=reader.read_preprocessor,
    read_errors=reader.read_errors,
    tensor_specs=layout.tensor_specs,
    open_weights=reader.open_weights,
    write=writer.write,
)
