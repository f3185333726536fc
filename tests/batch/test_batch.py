"""Many prompts at full occupancy: the texts of `generate`, in any order, also after a crash."""

import json

import pytest

from keras_gemma.batch import generate_batch, generate_file
from tests.models import compile_lm, make_lm

PROMPTS = ["To be, or", "the slings", "a sea of troubles, and by opposing", "No", "ay, there's the"]


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=48)


@pytest.fixture(scope="module")
def expected(lm):
    return [lm.generate(text, max_new_tokens=12, strip_prompt=True) for text in PROMPTS]


def texts_of(outputs):
    return {output.index: output.texts for output in outputs}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_same_texts_as_generate(lm, expected):
    outputs = list(generate_batch(lm, PROMPTS, max_batch_size=2, max_new_tokens=12))
    assert texts_of(outputs) == {i: [text] for i, text in enumerate(expected)}
    prompts = lm.preprocessor.tokenize_prompts(PROMPTS)
    assert {o.index: o.prompt_tokens for o in outputs} == dict(enumerate(map(len, prompts)))
    assert all(sum(output.new_tokens) <= 12 for output in outputs)


def test_formats_and_settings_of_their_own(lm):
    conversation = [{"role": "user", "content": "Who's there?"}]
    entries = [
        {"prompt": PROMPTS[0], "temperature": 0.9, "seed": 3, "num_return_sequences": 2},
        {"messages": conversation, "max_new_tokens": 5},
        conversation,
        lm.preprocessor.tokenize_prompts([PROMPTS[1]])[0].tolist(),
        {"prompt": PROMPTS[2], "stop": "e", "top_k": 9, "seed": 1},
    ]
    outputs = texts_of(generate_batch(lm, entries, max_batch_size=3, max_new_tokens=12))
    settings = {"max_new_tokens": 12, "strip_prompt": True}
    assert outputs == {
        0: lm.generate(PROMPTS[0], temperature=0.9, seed=3, num_return_sequences=2, **settings),
        1: [lm.generate_chat(conversation, max_new_tokens=5)],
        2: [lm.generate_chat(conversation, max_new_tokens=12)],
        3: [lm.generate(PROMPTS[1], **settings)],
        4: [lm.generate(PROMPTS[2], stop="e", top_k=9, seed=1, **settings)],
    }


def test_settings_of_compile(lm, expected):
    compile_lm(lm, max_new_tokens=12, temperature=0.7, seed=5)
    outputs = texts_of(generate_batch(lm, PROMPTS[:2], max_batch_size=2))
    texts = [lm.generate(text, strip_prompt=True) for text in PROMPTS[:2]]
    compile_lm(lm)
    assert outputs == {i: [text] for i, text in enumerate(texts)}


def test_a_queue_without_space_for_the_tokens_of_a_prompt(lm):
    """Such as many sequences per prompt, in a queue of at most 8 * 2 * 20 tokens."""
    prompts = [{"prompt": "No", "seed": i, "num_return_sequences": 100} for i in range(5)]
    settings = {"temperature": 1.0, "max_new_tokens": 1}
    outputs = generate_batch(lm, prompts, max_batch_size=2, max_length=20, **settings)
    assert sorted(output.index for output in outputs) == [0, 1, 2, 3, 4]


def test_a_prompt_longer_than_the_engine_is_named(lm):
    prompts = ["No", "the slings and arrows"]
    with pytest.raises(ValueError, match=r"Prompt 1: .*at most 12 tokens"):
        list(generate_batch(lm, prompts, max_length=12, max_new_tokens=5))


def test_prompts_are_read_as_slots_become_free(lm):
    read = []

    def prompts():
        for i in range(100):
            read.append(i)
            yield PROMPTS[i % len(PROMPTS)]

    outputs = generate_batch(lm, prompts(), max_batch_size=2, max_new_tokens=3)
    next(outputs)
    assert len(read) <= 10
    assert len(list(outputs)) == 99


def test_file(lm, expected, tmp_path):
    prompts = [PROMPTS[0], {"prompt": PROMPTS[1], "id": "b"}, *PROMPTS[2:]]
    source, target = write(tmp_path / "in.jsonl", prompts), tmp_path / "out.jsonl"
    seen = []
    count = generate_file(
        lm, source, target, max_batch_size=2, max_new_tokens=12, on_output=seen.append
    )
    assert count == len(seen) == 5
    lines = {line["index"]: line for line in lines_of(target)}
    assert [lines[i]["text"] for i in range(5)] == expected
    assert [line.get("id") for _, line in sorted(lines.items())] == [None, "b", None, None, None]
    with pytest.raises(FileExistsError, match="resume=True"):
        generate_file(lm, source, target)


def test_an_interrupted_run_resumes(lm, expected, tmp_path):
    source, target = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"

    def stop(output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_file(lm, source, target, max_batch_size=2, max_new_tokens=12, on_output=stop)
    (first,) = lines_of(target)
    with target.open("a") as file:
        file.write('{"index": 3, "te')  # a line that was being written
    assert generate_file(lm, source, target, resume=True, max_new_tokens=12) == 4
    lines = lines_of(target)
    assert lines[0] == first
    assert sorted(line["index"] for line in lines) == [0, 1, 2, 3, 4]
    assert [line["text"] for line in sorted(lines, key=lambda line: line["index"])] == expected
    assert generate_file(lm, source, target, resume=True, max_new_tokens=12) == 0
    assert generate_file(lm, source, target, overwrite=True, max_new_tokens=12) == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([3], r"line 1 must be a string"),
        (["a", {"promt": "b"}], r'prompt 1: .*either "prompt" or "messages"'),
        (["a", {"prompt": "b", "temprature": 1}], "prompt 1: .*Did you mean `temperature`"),
        (["a", "b", {"prompt": "b", "seed": 0.5}], "prompt 2: `seed` must be"),
        ([{"prompt": "x " * 20_000}], "prompt 0: "),
        ([{"prompt": "x", "return_logprobs": True}], "prompt 0: .*Leave out `return_logprobs`"),
        ([{"prompt": "x", "sampler": "beam"}], "prompt 0: The engine needs a sampler"),
        ([{"messages": [{"role": "model", "content": ""}]}], "prompt 0: "),
    ],
)
def test_bad_lines(lm, tmp_path, lines, message):
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises((ValueError, TypeError), match=message):
        generate_file(lm, source, target, max_new_tokens=12)
    assert not target.exists()


def test_bad_files(lm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(FileNotFoundError, match="file of prompts"):
        generate_file(lm, source, target)
    source.write_text('"a"\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2 is not valid JSON"):
        generate_file(lm, source, target)
    write(source, PROMPTS)
    target.write_text('{"index": 99}\n')
    with pytest.raises(ValueError, match="not the output of one of 5 prompts"):
        generate_file(lm, source, target, resume=True)
    assert target.read_text() == '{"index": 99}\n'
