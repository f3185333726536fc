"""Hugging Face's checkpoint folder.

layout.py          names of files and tensors
config_json.py     converts config.json to arguments and back
reader.py          reads a folder
writer.py          writes a folder
safetensors.py     locates the tensors in a safetensors file
flax.py            locates the arrays in a msgpack file of Flax
tokenizer_json.py  converts tokenizer.json to a SentencePiece model and back
"""

from keras_gemma.storage.format_interface import Format
from keras_gemma.storage.hugging_face import layout, reader, writer

FORMAT = Format(
    title="Hugging Face checkpoint",
    signs=f"`model_type` in {layout.CONFIG}, {layout.VOCABULARY}, or Hugging Face's "
    f"{layout.TOKENIZER}",
    library="transformers",
    files=layout.FILES,
    markers={layout.CONFIG: b'"model_type"', layout.TOKENIZER: b'"added_tokens"'},
    default_shard_size="5GB",
    matches=reader.matches,
    read_backbone=reader.read_backbone,
    read_tokenizer=reader.read_tokenizer,
    tensor_specs=reader.tensor_specs,
    open_weights=reader.open_weights,
    write=writer.write,
)
