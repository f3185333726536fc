"""`keras-gemma generate` with a test double of the model."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import typer

from keras_gemma.causal_lm.completion import Completion
from keras_gemma.cli import main
from keras_gemma.cli.loading import Choice
from keras_gemma.cli.texts import read_prompts
from tests.cli.process import Terminal

APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


class Model:
    """Test double that records the settings of each call."""

    def from_preset(self, preset, **arguments):
        self.loaded = (preset, arguments)
        return self

    def generate(self, prompts, strip_prompt, **settings):
        assert settings.pop("return_logprobs")
        self.settings, self.strip_prompt = settings, strip_prompt
        texts = [" ❧" if strip_prompt else f"{prompt} ❧" for prompt in prompts]
        return [Completion(text, [3, 4], "length") for text in texts]

    def stream(self, prompts, **settings):
        self.settings = settings
        for piece in (" ", "❧"):
            yield [piece] * len(prompts)
        return ["length" if prompt == "one" else "stop" for prompt in prompts]

    @property
    def backbone(self):
        return SimpleNamespace(config=SimpleNamespace(context_length=200))

    @property
    def preprocessor(self):
        """Preprocessor whose tokens are characters."""
        tokenizer = SimpleNamespace(encode=lambda texts: texts)
        return SimpleNamespace(tokenize_prompts=lambda texts: texts, tokenizer=tokenizer)


def choose(model, fit, dtype, quantization):
    """Same as `loading.choose`, for models that do not exist."""
    bits = {} if quantization is None else {"quantization": quantization}
    return Choice({"dtype": dtype, **bits}, "", True)


@pytest.fixture
def model(monkeypatch):
    double = Model()
    monkeypatch.setattr("keras_gemma.cli.loading.GemmaCausalLM", double)
    monkeypatch.setattr("keras_gemma.cli.loading.choose", choose)
    return double


def test_prompts():
    pipe = "from\na pipe\n"
    assert read_prompts(["a", "b"], Terminal()) == ["a", "b"]
    assert read_prompts([], io.StringIO(pipe)) == ["from\na pipe"]
    assert read_prompts(["a", "-"], io.StringIO(pipe)) == ["a", "from\na pipe"]
    assert read_prompts([""], Terminal()) == [""]


@pytest.mark.parametrize(
    ("prompts", "stdin", "message"),
    [([], Terminal(), "pass a prompt"), ([], io.StringIO(), "empty"), (["-"], Terminal(), "empty")],
)
def test_no_prompt(prompts, stdin, message):
    with pytest.raises(typer.BadParameter, match=message):
        read_prompts(prompts, stdin)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--seed", "7"], {"seed": 7, "sampler": "random"}),
        (["--seed", "7", "--stop", "a"], {"seed": 7, "stop": ["a"], "sampler": "random"}),
        (["--top-k", "5", "--seed", "7"], {"top_k": 5, "seed": 7}),
        (["--sampler", "beam"], {"sampler": "beam"}),
        (["--min-p", "0.1", "--repetition-penalty", "2"], {"min_p": 0.1, "repetition_penalty": 2}),
        (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
        (["--temperature", "0.5", "--top-p", "0.9"], {"temperature": 0.5, "top_p": 0.9}),
        (["--mode", "factual"], {"sampler": "greedy"}),
        (["--mode", "chat", "--top-p", "0.5"], {"temperature": 0.7, "top_p": 0.5}),
        (["--mode", "factual", "--temperature", "0.9"], {"temperature": 0.9}),
        (["--mode", "chat", "--sampler", "greedy"], {"sampler": "greedy"}),
        (["-t", "0.5", "-k", "5", "-p", "0.9"], {"temperature": 0.5, "top_k": 5, "top_p": 0.9}),
        (["-n", "3", "-t", "0.5", "-s", "7"], {"max_new_tokens": 3, "temperature": 0.5, "seed": 7}),
        (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
    ],
)
def test_options(model, options, settings):
    assert main(["generate", "one", *options]) == 0
    assert model.settings == {"max_new_tokens": 128, **settings}


def test_settings_are_checked_before_the_model_is_loaded(model, capsys):
    for options, message in (
        (["--top-p", "0"], "--top-p must be in (0, 1]. Received: --top-p 0"),
        (["--min-p", "2"], "--min-p must be in (0, 1]. Received: --min-p 2.0"),
        (["--sampler", "beam", "--top-k", "3"], "--top-k cannot be changed for BeamSampler"),
        (["--stop", ""], "Received: --stop ['']"),
    ):
        assert main(["generate", "one", *options]) == 2
        assert message in capsys.readouterr().err
    assert not hasattr(model, "loaded")


def test_default_number_of_new_tokens_fits_the_context(model):
    assert main(["generate", "x" * 150, "y" * 10]) == 0
    assert model.settings["max_new_tokens"] == [50, 128]
    assert main(["generate", "x" * 300]) == 0
    assert model.settings["max_new_tokens"] == 1


def test_one_text_is_streamed(model, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("one\n")
    assert main(["generate", "--file", str(file), "--benchmark"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "one ❧\n"
    about, figures = printed.err.splitlines()
    assert about.startswith("gemma_tiny_en: A Gemma 2 of 2.9 million parameters")
    assert about.endswith("2,855,616 parameters. License: Apache-2.0, " + APACHE)
    assert figures.startswith("3 tokens read, 2 generated in ")
    assert re.search(r" tokens/s(; peak memory \d+\.\d\d GB)?$", figures)
    assert main(["generate", "one", "--strip-prompt"]) == 0
    assert capsys.readouterr().out == " ❧\n"


def test_generate(model, capsys):
    assert main(["generate", "one", "two", "--dtype", "bfloat16", "--seed", "7"]) == 0
    assert capsys.readouterr().out == '==> "one" <==\none ❧\n\n==> "two" <==\ntwo ❧\n'
    assert model.loaded == ("gemma_tiny_en", {"dtype": "bfloat16"})
    assert model.settings["seed"] == 7


def test_note_of_a_text_that_reached_its_length(model, monkeypatch):
    for options, note in (
        (
            ["one"],
            "(the text reached the maximum length: --max-new-tokens, or the model's context)",
        ),
        (["two", "one", "one"], "(2 of 3 texts reached the maximum length"),
        (["one", "--sampler", "beam"], "(the text reached the maximum length"),
        (["two"], ""),
        (["one", "--silent"], ""),
    ):
        monkeypatch.setattr("sys.stderr", Terminal())
        assert main(["generate", *options]) == 0
        printed = sys.stderr.getvalue()
        assert note in printed and printed.count("maximum length") == bool(note)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert main(["generate", "one"]) == 0
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantization(model, bits):
    assert main(["generate", "one", "--quantization", bits]) == 0
    assert model.loaded == ("gemma_tiny_en", {"dtype": None, "quantization": bits})


def test_unknown_quantization(model, capsys):
    assert main(["generate", "one", "--quantization", "int3"]) == 2
    assert "'int3' is not one of 'int8', 'int4'" in " ".join(capsys.readouterr().err.split())
    assert not hasattr(model, "loaded")


def test_generate_json(model, capsys):
    assert main(["generate", "one", "two", "--model", "mine", "--json", "--strip-prompt"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    counts = {"finish_reason": "length", "prompt_tokens": 3, "new_tokens": 2}
    assert lines == [
        {"model": "mine", "prompt": "one", "text": " ❧", **counts},
        {"model": "mine", "prompt": "two", "text": " ❧", **counts},
    ]
    assert model.strip_prompt is True


def test_files_are_prompts(model, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text {name}\n")
    files = ["--file", str(tmp_path / "a"), "-f", str(tmp_path / "b")]
    assert main(["generate", "--json", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["text a", "text b"]


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x01\0", b"caf\xe9", b"\xff" * 500_000])
def test_binary_input_is_refused(model, content, tmp_path, monkeypatch, capsys):
    file = tmp_path / "program"
    file.write_bytes(content)
    assert main(["generate", "--file", str(file)]) == 2
    assert f"{file} is not a text in UTF-8" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert main(["generate", "-"]) == 2
    error = capsys.readouterr().err
    assert "standard input is not a text in UTF-8" in error and len(error) < 200


def test_errors_while_loading_are_not_usage_errors(model, monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError("a missing shard")

    monkeypatch.setattr(model, "from_preset", fail)
    with pytest.raises(FileNotFoundError, match="a missing shard"):
        main(["generate", "one"])
