"""`keras-gemma convert` and `quantize`: write a model in another format or precision."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from keras_gemma.cli.options import (
    BackendOption,
    DebugOption,
    Dtype,
    DtypeOption,
    Fit,
    JsonOption,
    LoraOption,
    Quantization,
    full_name,
    start,
)

SourceArgument = Annotated[
    str, typer.Argument(help="Preset name, kaggle:// or hf:// handle, or folder, in any format.")
]


class Format(StrEnum):
    """Format of a model."""

    KERAS = "keras"
    HUGGING_FACE = "hugging_face"
    GGUF = "gguf"


class GgufType(StrEnum):
    """Number format of a GGUF file."""

    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def convert(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="Folder to write, or file that ends in .gguf.")],
    to: Annotated[
        Format | None,
        typer.Option(
            help="Format to write. KerasHub also loads keras.",
            show_default="keras; gguf for a .gguf file",
        ),
    ] = None,
    lora: LoraOption = None,
    dtype: DtypeOption = None,
    gguf_type: Annotated[
        GgufType, typer.Option(help="Number format of a GGUF file.")
    ] = GgufType.BF16,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Maximum size of a weights file, such as 2GB.")
    ] = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a Keras preset, a Hugging Face checkpoint or a GGUF file.

    An adapter, --lora, is merged into the weights.
    """
    is_gguf = target.suffix == ".gguf"
    to = to or (Format.GGUF if is_gguf else Format.KERAS)
    if is_gguf != (to is Format.GGUF):
        raise typer.BadParameter(
            "the name of a GGUF file, and no other, ends in .gguf", param_hint="TARGET"
        )
    if to is Format.GGUF and max_shard_size is not None:
        raise typer.BadParameter("a GGUF model is one file", param_hint="--max-shard-size")
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.storage.formats import save_as

    check_target(target)
    name = full_name(source)
    lm = load(choose(name, Fit.EXACT, dtype), name, lora=lora)  # The writers merge it.
    if to is Format.GGUF:
        lm.save_to_gguf(target, gguf_type.value)
    else:
        save_as(lm, to.value, target, max_shard_size)
    print(f"Wrote {source} to {target} as {to.value}: {size_on_disk(target)}")


def quantize(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="Folder of the preset to write.")],
    bits: Annotated[
        Quantization, typer.Option(help="Precision of the matrices.")
    ] = Quantization.INT4,
    group_size: Annotated[int, typer.Option(min=1, help="int4: number of weights per scale.")] = 32,
    zeros: Annotated[bool, typer.Option("--zeros", help="int4: store zero points.")] = False,
    embedding: Annotated[
        Quantization, typer.Option(help="int4: precision of the embedding.")
    ] = Quantization.INT8,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of weights that are not quantized.")
    ] = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as an int8 or int4 preset, and report the quantization error."""
    start(backend, debug=debug)

    # These imports load Keras on the chosen backend.

    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.quantization import QuantizationConfig, report

    try:
        config = QuantizationConfig(bits.value, group_size, zeros, embedding.value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_target(target)
    dtype = dtype and dtype.value
    lm = GemmaCausalLM.from_preset(full_name(source), dtype=dtype, quantization=config)
    lm.save_to_preset(target)
    result = report(lm)
    print(json.dumps(result.to_dict()) if as_json else result)


def check_target(target: Path) -> None:
    """Raises a ValueError if `target` cannot be written. Called before a model is read."""
    from keras_gemma.storage.files import local_path, scratch_folder

    with scratch_folder(local_path(target, "target").absolute(), "target"):
        pass


def size_on_disk(target: Path) -> str:
    """Returns the number of files in `target` and their total size, to be printed."""
    files = [path for path in target.rglob("*") if path.is_file()] or [target]
    size = sum(path.stat().st_size for path in files)
    return f"{len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB"
