"""`keras-gemma convert` and `quantize`: a model from anywhere, written in another form."""

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
    LoraOption,
    Quantization,
    full_name,
    start,
)

SourceArgument = Annotated[
    str, typer.Argument(help="Name, kaggle:// or hf:// handle, or directory, in any format.")
]
BitsOption = Annotated[Quantization, typer.Option(help="Bits of the matrices.")]


class Format(StrEnum):
    """What a model can be written as."""

    KERAS = "keras"
    HUGGING_FACE = "hugging_face"
    GGUF = "gguf"


class GgufType(StrEnum):
    """How numbers are written to a GGUF file."""

    BF16 = "bf16"
    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def convert(
    source: SourceArgument,
    target: Annotated[
        Path, typer.Argument(help="The folder to write, or the file, ending in .gguf.")
    ],
    to: Annotated[
        Format | None,
        typer.Option(help="keras: a preset that KerasHub loads too; by default that, or gguf."),
    ] = None,
    lora: LoraOption = None,
    dtype: DtypeOption = None,
    gguf_type: Annotated[GgufType, typer.Option(help="Numbers of a GGUF file.")] = GgufType.BF16,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of weights, e.g. 2GB; not for gguf.")
    ] = None,
    backend: BackendOption = None,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a Keras preset, a Hugging Face checkpoint or a GGUF file.

    With --lora the adapter is merged.
    """
    named = target.suffix == ".gguf"
    to = to or (Format.GGUF if named else Format.KERAS)
    if named != (to is Format.GGUF):
        raise typer.BadParameter(
            "a GGUF file ends in .gguf, and what ends so is one", param_hint="TARGET"
        )
    if to is Format.GGUF and max_shard_size is not None:
        raise typer.BadParameter("a GGUF file is one file", param_hint="--max-shard-size")
    start(backend, debug=debug)

    # Imports Keras, on the chosen backend.
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.storage.formats import save_as

    check_target(target)
    name = full_name(source)
    lm = load(choose(name, Fit.EXACT, dtype), name, lora=lora)  # which the writers merge
    if to is Format.GGUF:
        lm.save_to_gguf(target, gguf_type.value)
    else:
        save_as(lm, to.value, target, max_shard_size)
    print(f"{source} is in {target} now, as {to.value}: {written(target)}")


def quantize(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="The folder of the preset to write.")],
    bits: BitsOption = Quantization.INT4,
    group_size: Annotated[
        int, typer.Option(min=1, help="Of int4: numbers that share a scale.")
    ] = 32,
    zeros: Annotated[bool, typer.Option("--zeros", help="Of int4: zero points too.")] = False,
    embedding: Annotated[
        Quantization, typer.Option(help="Of int4: bits of the embedding.")
    ] = Quantization.INT8,
    dtype: Annotated[Dtype | None, typer.Option(help="Of what is not quantized.")] = None,
    backend: BackendOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as a line of JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write SOURCE to TARGET as a preset in 8 or 4 bits, and report what that cost."""
    start(backend, debug=debug)

    # Imports Keras, on the chosen backend.
    import json

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
    found = report(lm)
    print(json.dumps(found.to_dict()) if as_json else found)


def check_target(target: Path) -> None:
    """Raise a ValueError where nothing can be written, before a model is read for minutes."""
    from keras_gemma.storage.files import local_path, scratch_folder

    with scratch_folder(local_path(target, "target").absolute(), "target"):
        pass


def written(target: Path) -> str:
    """How many files a model has, and their size together."""
    files = [path for path in target.rglob("*") if path.is_file()] or [target]
    size = sum(path.stat().st_size for path in files)
    return f"{len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:,.1f} MB"
