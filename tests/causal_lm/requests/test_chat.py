"""Chats: ids equal to those of transformers, cached turns, history, and full contexts."""

import numpy as np
import pytest
from keras import ops

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.chat import read_turns
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS
from tests.models import make_lm, on_torch

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Equivalent of Gemma's published chat template, including its errors."""

CHATS = [
    [{"role": "user", "content": "To be?"}],
    [
        {"role": "user", "content": "  To be,\n\nor not\n"},
        {"role": "assistant", "content": "\n<h1>Not</h1>  to be. "},
        {"role": "user", "content": ""},
        {"role": "model", "content": "die ▁ été"},
        {"role": "user", "content": "12 x"},
    ],
    [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
]


@pytest.fixture(scope="module")
def local(tiny_proto):
    """Model with local layers (window of 4) and global layers; replies of up to 6 tokens."""
    lm = make_lm("gemma2_grouped", tiny_proto, sequence_length=64)
    lm.compile(run_eagerly=lm.run_eagerly, max_new_tokens=6)
    return lm


def test_ids_equal_those_of_transformers(lm, tmp_path):
    import transformers

    lm.save_to_hugging_face(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = lm.preprocessor.tokenizer
    for chat in CHATS:
        for prompt in (True, False):
            text = theirs.apply_chat_template(
                chat, chat_template=TEMPLATE, add_generation_prompt=prompt, tokenize=False
            )
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            # A literal ▁ is a space to SentencePiece and so to transformers, and no space to us.
            if "▁" not in text:
                assert ours.apply_chat_template(chat, prompt) == ids
            assert ours.apply_chat_template(chat, prompt, tokenize=False) == text


def test_turns_prefill_only_their_tokens(local):
    """The replies equal those without a cache, also beyond the window."""
    tokenizer = local.preprocessor.tokenizer
    chat = local.chat(system="Be brief.")
    unread = None
    for text in ("To be?", "To sleep, perchance to <end_of_turn>", "aye, there's the rub"):
        reply = chat.send(text)
        reply_ids, prompt = chat._replies[reply.strip()], prompt_ids(chat, tokenizer)
        (fresh,) = local.generate([prompt])
        assert fresh[len(prompt) :][: len(reply_ids)] == reply_ids
        assert len(fresh) == len(prompt) + chat.new_tokens
        if unread is not None:
            asked = tokenizer.encode([f"user\n{text}"], parse_special=False)[0]
            around = "<end_of_turn>\n<start_of_turn><end_of_turn>\n<start_of_turn>model\n"
            own = len(asked) + len(tokenizer.encode([around])[0]) + unread
            assert (chat.prefilled_tokens, chat.cached_tokens) == (own, len(prompt) - own)
        unread = 0 if chat.finish_reason == "stop" else 1  # the last generated token
    assert [message["role"] for message in chat.history] == ["user", "assistant"] * 3


def prompt_ids(chat, tokenizer):
    """Returns the prompt of the last turn."""
    return tokenizer.encode_turns(read_turns(chat.messages[:-1]), replies=chat._replies)


def test_history_can_be_edited_and_undone(local):
    chat = local.chat()
    first = chat.send("To be?")
    assert chat.history == [
        {"role": "user", "content": "To be?"},
        {"role": "assistant", "content": first},
    ]
    second = chat.send("Or not?")
    assert chat.undo() == [
        {"role": "user", "content": "Or not?"},
        {"role": "assistant", "content": second},
    ]
    assert chat.send("Or not?") == second
    chat.undo()
    chat.history[1]["content"] = "a consummation"
    edited = chat.send("Or not?")
    assert edited == local.generate_chat(chat.messages[:-1])
    chat.clear()
    assert (chat.history, chat.undo()) == ([], [])
    assert chat.send("To be?") == first
    chat.history.append({"role": "assistant", "content": "x"})
    with pytest.raises(ValueError, match="Message 2 must have the role 'user'"):
        chat.send("y")
    assert len(chat.history) == 3


def test_chat_continues_a_given_history(local):
    begun = local.chat(system="Be brief.")
    begun.send("To be?")
    messages = [*begun.messages, {"role": "user", "content": "Or not?"}]
    chat = local.chat("Be brief.", history=begun.history)
    assert chat.send("Or not?") == local.generate_chat(messages)


def test_closing_a_stream_keeps_the_partial_reply(local):
    chat = local.chat()
    stream = chat.stream("To be?")
    assert chat.history == []
    first = next(stream)
    stream.close()
    assert chat.finish_reason == "closed"
    assert chat.history[1]["content"].startswith(first)
    chat.send("Or not?")
    assert chat.cached_tokens > 0
    assert "".join(local.chat().stream("To be?")) == local.chat().send("To be?")


def test_stops(local):
    """`<end_of_turn>` ends a reply and is part of the next prompt; stop strings are cut off."""
    tokenizer = local.preprocessor.tokenizer
    (words,) = tokenizer.encode(["to sleep, no more"])

    def force(ids, logits):
        forced = ops.convert_to_tensor(np.array([*words, 107], "int32"))
        starts = ops.sum(ops.cast(ids >= 0, "int32"), axis=1) - force.start
        forced = ops.take(forced, ops.clip(starts, 0, len(words)), axis=0)
        tokens = ops.arange(logits.shape[-1], dtype="int32")[None]
        return ops.where(tokens == forced[:, None], 0.0, -1e9) + 0.0 * logits

    message = {"role": "user", "content": "To be?"}
    force.start = len(tokenizer.apply_chat_template([message]))
    chat = local.chat(logits_processors=[force], max_new_tokens=20)
    assert chat.send("To be?") == "to sleep, no more"
    assert (chat.finish_reason, chat.new_tokens) == ("stop", len(words) + 1)
    chat.undo()
    assert chat.send("To be?", stop=" no") == "to sleep,"
    assert chat.finish_reason == "stop"


def test_a_full_context(tiny_proto):
    sizes = CONFIGURATIONS["gemma1_multi_query"] | {"context_length": 48}
    tokenizer = GemmaTokenizer(tiny_proto)
    lm = GemmaCausalLM(GemmaBackbone(**sizes), GemmaCausalLMPreprocessor(tokenizer, 48))
    lm.compile(run_eagerly=on_torch())

    with pytest.raises(ValueError, match=r"the limit is 48.*Make the message shorter"):
        lm.chat(context_full="drop_oldest").send("to be " * 60)
    chat = lm.chat(max_new_tokens=6)
    chat.send("to be or not to be")
    chat.send("that is")
    with pytest.raises(ValueError, match="context_full='drop_oldest'"):
        chat.send("to be or not to be")
    assert len(chat.history) == 4

    history = chat.history[:]
    chat = lm.chat("Be.", "drop_oldest", history=history, max_new_tokens=6)
    asked = {"role": "user", "content": "to be or not"}

    def left(dropped):
        messages = [{"role": "system", "content": "Be."}, *history[dropped:], asked]
        return 48 - len(tokenizer.apply_chat_template(messages))

    count = next(n for n in (0, 2, 4) if left(n) >= 12)  # a quarter is free again
    assert count > 0
    with pytest.warns(UserWarning, match=f"the oldest {count} messages were dropped"):
        reply = chat.send(asked["content"])
    assert chat.dropped == history[:count]
    assert chat.history == [*history[count:], asked, {"role": "assistant", "content": reply}]
    assert chat.messages[0] == {"role": "system", "content": "Be."}
    short = lm.chat(max_new_tokens=40)  # the reply is shortened, without an error
    short.send("to be or not")
    assert short.finish_reason == "length"
    assert short.new_tokens < 40


def test_changed_weights_invalidate_the_cache(tiny_proto):
    lm = make_lm(proto=tiny_proto, sequence_length=64)
    chat = lm.chat(max_new_tokens=4)
    chat.send("To be?")
    norm = lm.backbone.layer_norm.scale
    norm.assign(norm.value * 2.0)
    chat.send("Or not?")
    assert chat.cached_tokens == 0
    prompt = prompt_ids(chat, lm.preprocessor.tokenizer)
    (fresh,) = lm.generate([prompt], max_new_tokens=4)
    assert len(fresh) == len(prompt) + chat.new_tokens
    assert lm.preprocessor.tokenizer.detokenize(fresh[len(prompt) :]) == chat.history[-1]["content"]


def test_speculative_decoding_keeps_the_cache(lm):
    plain, drafted = lm.chat(max_new_tokens=12), lm.chat(max_new_tokens=12, draft="prompt")
    for text in ("to be or not to be", "to be or not to be"):
        assert plain.send(text) == drafted.send(text)
        assert plain.prefilled_tokens == drafted.prefilled_tokens


def test_generate_chat(lm):
    message = {"role": "user", "content": "To be?"}
    ids = lm.preprocessor.tokenizer.apply_chat_template([message])
    (expected,) = lm.generate([ids], max_new_tokens=6)
    reply = lm.generate_chat([message], max_new_tokens=6)
    assert reply == lm.preprocessor.tokenizer.detokenize(expected[len(ids) :])
    two = [[message], [{"role": "user", "content": "Or not to be, to be?"}]]
    replies = lm.generate_chat(two, max_new_tokens=6)
    assert replies[0] == reply and len(replies) == 2
    many = lm.generate_chat(
        [message], max_new_tokens=3, temperature=1.0, num_return_sequences=2, seed=0
    )
    assert len(many) == 2
    row = lm.generate_chat([message], max_new_tokens=3, return_logprobs=True)
    assert reply.startswith(row.text)
    assert len(row.logprobs) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"context_full": "drop"}, ValueError, "`context_full` must be"),
        ({"temprature": 1}, TypeError, "`chat` has no argument `temprature`"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"num_return_sequences": 2, "temperature": 1.0}, ValueError, "`generate_chat`"),
        ({"return_logprobs": True}, ValueError, "`generate_chat`"),
        ({"history": [{"role": "assistant", "content": "x"}]}, ValueError, "Message 0"),
        ({"system": 3, "history": CHATS[0]}, TypeError, "content of a message"),
    ],
)
def test_bad_arguments(arguments, error, says, lm):
    with pytest.raises(error, match=says):
        lm.chat(**arguments)


def test_bad_messages(lm):
    chat = lm.chat()
    with pytest.raises(TypeError, match="`text` must be a string"):
        chat.send(None)
    with pytest.raises(ValueError, match="decodes token by token"):
        chat.send("x", sampler="beam")
    with pytest.raises(TypeError, match="no argument `tempo`"):
        chat.send("x", tempo=1)
    assert chat.history == []
    with pytest.raises(ValueError, match="no preprocessor"):
        make_lm().chat()
    with pytest.raises(ValueError, match="no preprocessor"):
        make_lm().generate_chat(CHATS[0])


@pytest.mark.once
def test_repr(local):
    assert repr(local.chat()) == "Chat(system=None, 0 messages)"
    chat = local.chat(system="Be brief.", history=CHATS[1][:2])
    assert repr(chat).startswith("Chat(system='Be brief.', 2 messages, last='\\n<h1>Not")
