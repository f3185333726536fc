"""`keras-gemma convert` and `quantize`: write a model in another format or precision."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from keras_gemma import progress
from keras_gemma.cli.options import (
    BackendOption,
    DebugOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LoadedQuantization,
    LoraOption,
    OverwriteOption,
    Quantization,
    full_name,
    start,
)
from keras_gemma.cli.printing import plural

SourceArgument = Annotated[
    str,
    Argument(help="Preset name, kaggle:// or hf:// handle, folder in any format, or GGUF file."),
]


Format = Literal["keras", "hugging_face", "gguf", "orbax"]
"""Format of a model."""

GgufType = Literal["bf16", "f16", "q8_0", "q4_0"]
"""Number format of a GGUF file."""


def convert(
    source: SourceArgument,
    target: Path = Argument(help="Folder to write, or file that ends in .gguf."),
    to: Format | None = Option(
        None,
        help="Format to write. KerasHub also loads keras.",
        show_default="keras; gguf for a .gguf file",
    ),
    lora: LoraOption = None,
    dtype: DtypeOption = None,
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices. as_stored: that of a GGUF file."
    ),
    gguf_type: GgufType = Option("bf16", help="Number format of a GGUF file."),
    max_shard_size: str | None = Option(None, help="Maximum size of a weights file, such as 2GB."),
    overwrite: OverwriteOption = False,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a Keras preset, another checkpoint or a GGUF file.

    An adapter, --lora, is merged into the weights.
    """
    is_gguf = target.suffix == ".gguf"
    to = to or ("gguf" if is_gguf else "keras")
    if is_gguf != (to == "gguf"):
        raise BadParameter(
            "the name of a GGUF file, and no other, ends in .gguf", param_hint="TARGET"
        )
    if is_gguf and max_shard_size is not None:
        raise BadParameter("a GGUF model is one file", param_hint="--max-shard-size")
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.storage.formats import MODELS, save_as
    from keras_gemma.storage.gguf.writer import GGUF_FILES

    check_target(target, GGUF_FILES if is_gguf else MODELS, overwrite)
    name = full_name(source)
    lm = load(choose(name, "exact", dtype, quantization), name, lora=lora)  # The writers merge it.
    with progress.status(f"Writing {target} ..."):
        if is_gguf:
            lm.save_to_gguf(target, gguf_type, overwrite=overwrite)
        else:
            save_as(lm, to, target, max_shard_size, overwrite=overwrite)
    print(f"Wrote {source} to {target} as {to}: {size_on_disk(target)}")


def quantize(
    source: SourceArgument,
    target: Path = Argument(help="Folder of the preset to write."),
    bits: Quantization = Option("int4", help="Precision of the matrices."),
    group_size: int = Option(32, min=1, help="int4: number of weights per scale."),
    zero_points: bool = Option(False, "--zero-points", help="int4: store a zero point per group."),
    zeros: bool = Option(False, "--zeros", hidden=True, help="Earlier name of --zero-points."),
    embedding: Quantization = Option("int8", help="int4: precision of the embedding."),
    dtype: Dtype | None = Option(None, help="Data type of weights that are not quantized."),
    overwrite: OverwriteOption = False,
    backend: BackendOption = None,
    verbose: bool = Option(False, "--verbose", help="Print the error of each weight."),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as an int8 or int4 preset, and report the quantization error."""
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.cli.loading import read_description
    from keras_gemma.quantization import QuantizationConfig, report, to_config
    from keras_gemma.storage.formats import MODELS

    try:
        config = QuantizationConfig(bits, group_size, zero_points or zeros, embedding)
    except ValueError as error:
        raise BadParameter(str(error)) from error
    check_target(target, MODELS, overwrite)
    stored = to_config(read_description(full_name(source)).get("quantization"))
    if stored not in (None, config):
        raise BadParameter(
            f"{source} is quantized already ({stored.describe()}): pass the original model",
            param_hint="SOURCE",
        )
    with progress.status(f"Quantizing {source} ..."):
        lm = GemmaCausalLM.from_preset(full_name(source), dtype=dtype, quantization=config)
        lm.save_to_preset(target, overwrite=overwrite)
        result = report(lm)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    print(result if verbose else result.summary())
    print(f"Wrote {source} to {target}: {size_on_disk(target)}")


def check_target(
    target: Path, kind: Any, overwrite: bool, argument: str = "target", in_place: bool = False
) -> None:
    """Checks that `target` can be written, before a model is read.

    `kind` is the `Kind` that may be replaced, and `argument` the name of the parameter. Files are
    added to an earlier result if it is changed `in_place`, otherwise a new one replaces it.
    """
    from keras_gemma.storage import files

    target = files.local_path(target, argument).absolute()
    try:
        files.check_target(target, kind, overwrite, argument)
    except ValueError as error:
        message = str(error).replace(f"`{argument}`", "The target")
        for words in ("`overwrite=True`", "overwrite=True"):
            message = message.replace(words, "--overwrite")
        raise ValueError(message) from error
    files.check_writable(target if in_place else target.parent, argument)


def size_on_disk(target: Path) -> str:
    """Returns the number of files in `target` and their total size, to be printed."""
    files = [path for path in target.rglob("*") if path.is_file()] or [target]
    size = sum(path.stat().st_size for path in files)
    return f"{plural(len(files), 'file')}, {size / 1e6:,.1f} MB"
