"""The real vocabularies and chat templates of Gemma 2 and Gemma 3, compared with Hugging Face's."""

import itertools
import json
import random
from pathlib import Path

import pytest
import tokenizers

from keras_gemma.storage.hugging_face.tokenizer_json import read_tokenizer_json
from keras_gemma.text.chat import read_turns
from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA3
from tests.npm import tokenizer_folder
from tests.storage.conftest import Task, make_task, save_to_hugging_face

ROOT = Path(__file__).parents[2]
COUNT = 2000
"""Number of texts."""

SPACES = " \n\t\r\u00a0\u3000"
CJK = "日本語のテキスト、漢字とかな。中文字符测试。繁體字。한국어 문장 시험"
EMOJI = "😀👩‍👩‍👧🇯🇵👍🏽❤️🏳️‍🌈🤖𝔘𝕏𐍈"
HTML = (
    "<table><thead><tr><th>a</th></tr></thead><tbody><td>b</td></tbody></table><h1>c</h1>"
    "<ul><li>d</li></ul><blockquote><strong>e</strong><em>f<br></em><sup>g</sup><code>h</code>"
)
CONTROL = [
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<2mass>"),
    *("[@BOS@]", "[multimodal]", "<unused7>", "<unused70>", "<unused6000>", "<start_of_image>"),
    *("<end_of_image>", "<image_soft_token>", "<start_of_turn", "<0x41>", "<|fim_prefix|>"),
    *("<start_of_turn>user\n", "<end_of_turn>\n"),
]
RANGES = [(0, 0x250), (0x370, 0x700), (0x900, 0xE00), (0x2000, 0x2C00), (0x4E00, 0x9FFF)]
RANGES += [(0x1F300, 0x1FA00), (0x10000, 0x11000)]
LENGTHS = (1, 2, 3, 4, 7, 15, 16, 30, 31, 32, 33, 40, 64, 100)
"""Lengths of runs; vocabularies have pieces of up to 31 spaces."""


def mixed_texts(count, seed=0):
    """Returns random sequences of code, prose, scripts, emoji, runs, markup and control tokens.

    They do not have the character ▁, which `test_only_ours_preserves_the_mark_of_a_space` tests.
    """
    r = random.Random(seed)
    code, prose = (
        "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern)))
        for pattern in ("keras_gemma/*/*.py", "docs/*.md")
    )

    def cut(text, longest):
        start = r.randrange(len(text))
        return text[start : start + r.randint(1, longest)]

    kinds = [
        lambda: cut(code, 200),
        lambda: cut(prose, 150),
        lambda: cut(CJK, 12),
        lambda: cut(HTML, 40),
        lambda: "".join(r.choices(EMOJI, k=r.randint(1, 5))),
        lambda: r.choice(" \n\t") * r.choice(LENGTHS),
        lambda: "".join(r.choices(SPACES, k=r.randint(1, 8))),
        lambda: r.choice(CONTROL),
        lambda: "".join(chr(r.randrange(*r.choice(RANGES))) for _ in range(r.randint(1, 10))),
        lambda: f"{r.randrange(10 ** r.randint(1, 15)):{r.choice(['', ',', 'e', 'x'])}}",
    ]
    texts = ("".join(r.choice(kinds)() for _ in range(r.randint(1, 7))) for _ in range(count))
    return [text.replace("▁", "_") for text in texts]


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def folder(request):
    return tokenizer_folder(request.param)


@pytest.fixture(scope="module")
def ours(folder):
    return GemmaTokenizer(read_tokenizer_json(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def template_of(folder):
    content = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    return json.loads(content)["chat_template"]


def test_ids_and_round_trips(folder, ours, theirs):
    texts = mixed_texts(COUNT)
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.detokenize(ids, skip_special_tokens=False) == text
    assert ours.vocabulary_size() == theirs.get_vocab_size()
    stops = {"gemma2": [1, 107], "gemma3": [1, 106]}
    assert ours.stop_token_ids == stops[folder.name]
    assert (ours.pad_token_id, ours.start_token_id) == (0, 2)


def test_only_ours_preserves_the_mark_of_a_space(ours, theirs):
    """A literal ▁ is a space to Hugging Face's tokenizer, and no space to ours."""
    text = "a▁b"
    (ids,) = ours.encode([text])
    assert ours.detokenize(ids) == text
    same = theirs.encode(text, add_special_tokens=False).ids
    assert same == theirs.encode("a b", add_special_tokens=False).ids


def test_added_token_without_a_row_is_dropped(folder, ours):
    if folder.name == "gemma2":
        pytest.skip("only Gemma 3 has such a token")
    text_only = GemmaTokenizer(read_tokenizer_json(folder / "tokenizer.json", 262144))
    assert text_only.get_vocabulary() == ours.get_vocabulary()[:262144]
    texts = [text for text in mixed_texts(200, seed=1) if "<image_soft_token>" not in text]
    assert text_only.encode(texts) == ours.encode(texts)


CONTENTS = [
    "To be?",
    "  To be,\n\nor not\n",
    "",
    " \n",
    "\u3000x\u00a0",
    "a {{ b }} 'c' \\n <b>",
    "▁",
]
ROLES = [
    ["user"],
    ["user", "assistant"],
    ["user", "model", "user"],
    ["user", "tool", "user", "assistant"],
]


def conversations(with_system):
    r = random.Random(0)
    for roles, _ in itertools.product(ROLES, range(40)):
        all_roles = ["system", *roles] if with_system else roles
        yield [{"role": role, "content": r.choice(CONTENTS)} for role in all_roles]


def in_parts(message, number=1):
    """Returns a message whose content is a list; that of a system message has one part."""
    text = message["content"]
    cut = len(text) if number == 1 or message["role"] == "system" else len(text) // 2
    parts = [text[:cut], text[cut:]][:number]
    return {**message, "content": [{"type": "text", "text": part} for part in parts]}


def render(template, messages, prompt):
    """Renders a template as transformers does."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<bos>"
    )
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )


def test_chat_template(folder, ours, theirs):
    published = template_of(folder)
    for with_system, prompt in itertools.product((False, True), (False, True)):
        if with_system and folder.name == "gemma2":
            continue  # refused
        for messages in conversations(with_system):
            text = render(published, messages, prompt)
            parts = [in_parts(message) for message in messages]
            assert ours.apply_chat_template(parts, prompt, tokenize=False) == text
            assert render(CHAT_TEMPLATE, parts, prompt) == text
            if folder.name == "gemma3":
                assert render(published, parts, prompt) == text
                halves = [in_parts(message, 2) for message in messages]
                joined = render(published, halves, prompt)
                assert ours.apply_chat_template(halves, prompt, tokenize=False) == joined
                assert render(CHAT_TEMPLATE, halves, prompt) == joined
            assert ours.apply_chat_template(messages, prompt, tokenize=False) == text
            assert render(CHAT_TEMPLATE, messages, prompt) == text
            if "▁" not in text:
                ids = theirs.encode(text, add_special_tokens=False).ids
                assert ours.apply_chat_template(messages, prompt) == ids


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["system", "assistant"], ["user", "model", "model"]]
)
def test_both_refuse_roles_that_do_not_alternate(roles, folder):
    import jinja2

    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(jinja2.exceptions.TemplateError):
        render(template_of(folder), messages, True)
    with pytest.raises(ValueError, match="must alternate"):
        read_turns(messages)


def test_checkpoint_with_the_real_vocabulary(tmp_path):
    """transformers loads the tokenizer and the stop tokens, and encodes the same."""
    import transformers

    published = tokenizer_folder("gemma3") / "tokenizer.json"
    small = {"hidden_dim": 8, "intermediate_dim": 16, "num_layers": 1, "num_query_heads": 1}
    proto = read_tokenizer_json(published, 262144)
    task = make_task(GEMMA3 | small | {"vocabulary_size": 262144}, proto)
    save_to_hugging_face(task, tmp_path)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert settings.eos_token_id == [1, 106]
    assert (settings.bos_token_id, settings.pad_token_id) == (2, 0)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = tokenizers.Tokenizer.from_file(str(published))
    for text in mixed_texts(300, seed=2):
        if "<image_soft_token>" not in text:
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert saved.encode(text, add_special_tokens=False).ids == ids, text

    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_bytes(published.read_bytes())
    tokenizer = Task.from_preset(tmp_path).preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == 262144
