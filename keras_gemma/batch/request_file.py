"""JSON-lines files: a prompt on each line of one, and its texts on a line of another.

A line of the output is written when its prompt is finished, so an interrupted run has lost only the
prompts that were in progress. A run with `resume` skips the prompts that the output has.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma.batch.generate import BatchOutput, generate_batch, read_prompt
from keras_gemma.causal_lm.settings import read_settings
from keras_gemma.generation.engine import DEFAULT_BATCH_SIZE

COPIED_KEYS = ("id",)
"""Keys of an input line that are copied to its output line."""


def generate_file(
    lm: Any,
    input: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_batch_size: int = DEFAULT_BATCH_SIZE,
    on_output: Callable[[BatchOutput], None] | None = None,
    **settings: Any,
) -> int:
    """Generates text for each line of a file. The slots of the engine are always full.

    A line of the input is a string, `{"prompt": ...}` or `{"messages": [...]}`, with settings of
    its own such as `"max_new_tokens"` and `"seed"`, and an optional `"id"`. A line of the output is
    `{"index", "id", "text", "finish_reason", "prompt_tokens", "new_tokens"}`, where `"index"` is
    the number of the input line, from 0. With several sequences per prompt, the values are lists.
    The lines are in the order in which they finish.

    Args:
        lm: A `GemmaCausalLM` with a preprocessor.
        input: The file of prompts.
        output: The file of texts.
        resume: If True, adds the missing lines to `output`.
        overwrite: If True, replaces `output`.
        max_batch_size: Maximum number of sequences that are decoded together.
        on_output: Function that is called for each finished prompt.
        **settings: Same as in `generate_batch`.

    Returns:
        The number of texts that were written.

    Raises:
        FileNotFoundError: If `input` does not exist.
        FileExistsError: If `output` exists, and neither `resume` nor `overwrite` is True.
        ValueError, TypeError: If a line of the input or a setting is invalid. All lines are checked
            before anything is generated.
    """
    prompts = read_prompt_lines(Path(input))
    path = Path(output)
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"The output file {str(path)!r} exists. Pass resume=True to add the missing lines, or "
            "overwrite=True to replace it."
        )
    done = finished_indices(path, len(prompts)) if resume and path.exists() else set()
    missing = [i for i in range(len(prompts)) if i not in done]
    entries = [without_id(prompts[i]) for i in missing]
    shared = read_settings(settings, "generate_file").with_defaults(lm.generation_settings)
    max_length = settings.get("max_length") or lm.backbone.config.context_length
    for index, entry in zip(missing, entries, strict=True):
        try:
            read_prompt(lm, entry, shared, max_length)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{Path(input).name}, prompt {index}: {error}") from error
    with path.open("a" if done else "w", encoding="utf-8") as file:
        outputs = generate_batch(lm, entries, max_batch_size=max_batch_size, **settings)
        for result in outputs:
            index = missing[result.index]
            line = output_line(index, prompts[index], result)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            if on_output is not None:
                on_output(result)
    return len(missing)


def read_prompt_lines(path: Path) -> list[Any]:
    """Returns the prompts of a file, one for each line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"The file of prompts {str(path)!r} does not exist.")
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number} is not valid JSON: {error}.") from error
        if not isinstance(prompt, str | dict):
            raise ValueError(
                f'{path.name}, line {number} must be a string, {{"prompt": ...}} or '
                f'{{"messages": [...]}}. Received: {prompt!r:.80}'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"The file of prompts {str(path)!r} is empty.")
    return prompts


def finished_indices(path: Path, count: int) -> set[int]:
    """Returns the indices of the lines that an output file has, and cuts an incomplete last one."""
    done, size = set(), 0
    for line in _whole_lines(path):
        try:
            index = json.loads(line)["index"]
            if not 0 <= index < count:
                raise KeyError(index)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} has a line that is not the output of one of {count} prompts. Pass "
                f"another file, or overwrite=True. Received: {line.decode(errors='replace'):.80}"
            ) from error
        done.add(index)
        size += len(line)
    with path.open("r+b") as file:
        file.truncate(size)
    return done


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def without_id(prompt: Any) -> Any:
    """Returns a prompt without the keys that are only copied."""
    if not isinstance(prompt, dict):
        return prompt
    return {key: value for key, value in prompt.items() if key not in COPIED_KEYS}


def output_line(index: int, prompt: Any, result: BatchOutput) -> dict[str, Any]:
    """Returns the line of the output file for one prompt."""
    single = len(result.texts) == 1
    copied = {key: prompt[key] for key in COPIED_KEYS if isinstance(prompt, dict) and key in prompt}
    return {
        "index": index,
        **copied,
        "text": result.texts[0] if single else result.texts,
        "finish_reason": result.finish_reasons[0] if single else result.finish_reasons,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens[0] if single else result.new_tokens,
    }
