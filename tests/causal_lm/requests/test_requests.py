"""Settings of a call reach the generator, or raise an error that names them."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import samplers
from keras_gemma.generation.programs import MAX_PROGRAMS
from keras_gemma.generation.session import hashable
from tests.models import compile_lm, make_lm

IDS = [[2, 9, 31, 8, 300], [2, 40]]
SETTINGS = {"max_new_tokens": 4, "stop_token_ids": None, "strip_prompt": True}


class Last(samplers.TopKSampler):
    """Custom rule on top of a built-in sampler: picks the least likely token."""

    def choose(self, logits, state):
        return ops.argmin(logits, axis=-1)


class Drawing(samplers.GreedySampler):
    """Random sampling in a subclass of the greedy sampler."""

    def choose(self, logits, state):
        return samplers.RandomSampler(seed=1).choose(logits, state)


class Maker(samplers.TopKSampler):
    """Sampler whose constructor `dataclasses.replace` cannot call."""

    def __init__(self):
        super().__init__(k=3)


def test_program_cache_is_bounded_and_keeps_recent_programs(lm):
    generator = lm.programs
    generator.programs.clear()  # other tests share the model
    lm.generate(IDS, **SETTINGS)
    used = {key: program for key, program in generator.programs.items() if "greedy" in key}
    for _ in range(MAX_PROGRAMS):
        lm.generate(IDS, logits_processors=[lambda ids, logits: logits], max_new_tokens=1)
        lm.generate(IDS, **SETTINGS)
        assert len(generator.programs) <= MAX_PROGRAMS
    assert used and all(generator.programs[key] is program for key, program in used.items())


def test_custom_sampler_keeps_its_rule_when_a_setting_is_overridden(lm):
    expected = lm.generate(IDS, sampler=Last(), **SETTINGS)
    assert expected != lm.generate(IDS, **SETTINGS)
    assert lm.generate(IDS, sampler=Last(), temperature=0.5, **SETTINGS) == expected
    for sampler, setting in ((Last(), "top_k"), (Maker(), "temperature"), (Drawing(), "min_p")):
        with pytest.raises(ValueError, match=f"`{setting}` cannot be changed for"):
            lm.generate(IDS, sampler=sampler, **{setting: 1})
    beams = {"sampler": samplers.BeamSampler(num_beams=2), "return_logprobs": True}
    warm = samplers.BeamSampler(num_beams=2, temperature=3.0)
    (a, *_), (b, *_) = (
        lm.generate(IDS, **SETTINGS, **beams, temperature=3.0),
        lm.generate(IDS, **SETTINGS, **(beams | {"sampler": warm})),
    )
    assert a.score == b.score


def test_num_return_sequences_with_a_subclass_of_greedy(lm):
    rows = lm.generate(IDS[:1], sampler=Drawing(), num_return_sequences=3, **SETTINGS)
    assert len(rows[0]) == 3 and len(set(map(tuple, rows[0]))) > 1


@pytest.mark.parametrize("where", ["call", "sampler"])
def test_equal_prompts_with_one_seed_each(lm, where):
    def generate(prompts, seed):
        if where == "call":
            return lm.generate(prompts, temperature=2.0, seed=seed, **SETTINGS)
        sampler = samplers.RandomSampler(temperature=2.0, seed=seed)
        return lm.generate(prompts, sampler=sampler, **SETTINGS)

    one, two = generate(IDS[:1], 1)[0], generate(IDS[:1], 2)[0]
    assert generate(IDS[:1] * 2, [1, 2]) == [one, two] and one != two
    first, again = generate(IDS[:1] * 2, [1, 1 + 2**32])  # the same seed, of 32 bits
    assert first == one and again != one


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (samplers.TopKSampler(k=[1, 500]), "k"),
        (samplers.TopPSampler(p=[0.1, 0.5], k=3), "p"),
        (samplers.RandomSampler(temperature=[1.0, 2.0]), "temperature"),
        (samplers.RandomSampler(seed=[1, 2]), "seed"),
        (samplers.BeamSampler(length_penalty=[1.0, 2.0]), "length_penalty"),
    ],
)
@pytest.mark.parametrize("prompts", [1, 3, 4])
def test_sampler_lists_have_one_value_per_prompt(lm, sampler, name, prompts):
    assert len(lm.generate(IDS, sampler=sampler, **SETTINGS)) == 2
    says = f"`{name}` must be one value, or one for each prompt. Received: 2 values for {prompts}"
    with pytest.raises(ValueError, match=says):
        lm.generate(IDS[:1] * prompts, sampler=sampler, **SETTINGS)


def test_prefix_is_valid_only_for_this_model_and_its_weights(lm):
    other = make_lm()
    prefix = lm.prefill(IDS[0])
    expected = lm.generate(IDS[:1], **SETTINGS)
    assert lm.generate(IDS[:1], prefix=prefix, **SETTINGS) == expected
    with pytest.raises(ValueError, match="`prefix` was computed by another model"):
        other.generate(IDS[:1], prefix=prefix, **SETTINGS)
    with pytest.raises(TypeError, match="`prefix` must be a prefix cache returned by `prefill`"):
        lm.generate(IDS[:1], prefix="To be", **SETTINGS)
    prefix = other.prefill(IDS[0])
    norm = other.backbone.layer_norm.scale
    norm.assign(norm.value * 2)
    with pytest.raises(ValueError, match="`prefix` was computed with other weights"):
        other.generate(IDS[:1], prefix=prefix, **SETTINGS)
    other.generate(IDS[:1], prefix=other.prefill(IDS[0]), **SETTINGS)


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        ([], ValueError, "Prompt 0 has no tokens"),
        ([2] * 9000, ValueError, "Prompt 0 has 9000 tokens, but the context length is 8192"),
        (["To be", "or not"], ValueError, "`inputs` must be one text"),
        (IDS, ValueError, "`inputs` must be one text"),
        ([2, 10**6], ValueError, "`inputs` must be in"),
        (None, TypeError, "`inputs` must be a string, or a list of ids"),
        ({"token_ids": IDS}, TypeError, "`inputs` must be a string, or a list of ids"),
    ],
)
def test_prefill_refuses_invalid_inputs(lm, inputs, error, says):
    with pytest.raises(error, match=says):
        lm.prefill(inputs)


@dataclasses.dataclass
class Ban:
    """Unhashable logits processor."""

    token: int

    def __call__(self, ids, logits):
        return ops.where(ops.arange(logits.shape[-1])[None] == self.token, -1e9, logits)


class Listed(samplers.Sampler):
    """Unhashable sampler."""

    __hash__ = None

    def choose(self, logits, state):
        return ops.argmax(logits, axis=-1)


def test_unhashable_samplers_and_processors(lm):
    (expected,) = lm.generate(IDS[:1], **SETTINGS)
    ban = Ban(expected[0])
    (result,) = lm.generate(IDS[:1], logits_processors=[ban], sampler=Listed(), **SETTINGS)
    assert result[0] != expected[0]
    assert hashable(ban) == hashable(ban) and hash(hashable(ban)) == hash(hashable(ban))
    assert hashable(ban) != hashable(Ban(expected[0]))  # they are mutable and may differ later
    assert hashable("greedy") == "greedy"


def test_numbers_of_numpy(lm):
    settings = {"top_k": 3, "seed": 4, **SETTINGS}
    expected = lm.generate(IDS, temperature=0.5, **settings)
    assert lm.generate(IDS, temperature=np.array(0.5), **settings) == expected
    assert lm.generate(IDS, temperature=np.float32(0.5), **settings) == expected
    rows = lm.generate(IDS, return_logprobs=np.int64(2), **settings)
    assert all(len(top) == 2 for row in rows for top in row.top_logprobs)
    ids = np.array([[2, 200, 0, 0], [2, 0, 0, 0]])
    padded = {"token_ids": ids, "padding_mask": ids > 0}
    result = lm.generate(padded, max_new_tokens=np.array([1, 2]), stop_token_ids=None)
    assert result["padding_mask"].sum(1).tolist() == [3, 3]


def test_invalid_processors_and_stop_strings(lm):
    with pytest.raises(TypeError, match="`logits_processors` must be a list of functions"):
        lm.generate(IDS, logits_processors=lambda ids, logits: logits)
    with pytest.raises(TypeError, match="`stop` must be a non-empty string"):
        lm.generate("To be", stop=5)
    with pytest.raises(ValueError, match=r"nothing must return logits .* Received: None"):

        def nothing(ids, logits):
            return None

        lm.generate(IDS, logits_processors=[nothing])


def test_disabling_stop_token_ids_at_compile_and_in_a_call(lm):
    stop = lm.generate(IDS[:1], **SETTINGS)[0][1]
    settings = {"max_new_tokens": 4, "strip_prompt": True}

    def length(**more):
        return len(lm.generate(IDS[:1], **settings, **more)[0])

    compile_lm(lm, stop_token_ids=[stop])
    assert length() == length(stop_token_ids="auto") == 2
    assert length(stop_token_ids=None) == length(stop_token_ids=()) == 4
    lm.preprocessor.tokenizer.end_token_id = stop
    compile_lm(lm)
    assert length() == 2
    compile_lm(lm, stop_token_ids=None)
    assert length() == 4
    compile_lm(lm)
    lm.preprocessor.tokenizer.end_token_id = 1


def test_draft_with_another_vocabulary(lm, tiny_proto):
    draft = make_lm(proto=tiny_proto)
    assert lm.generate("To be", draft=draft, max_new_tokens=2)
    proto = draft.preprocessor.tokenizer.proto
    swapped = proto.replace("▁the".encode(), "▁hte".encode())
    assert swapped != proto
    draft.preprocessor.tokenizer.set_proto(swapped)
    with pytest.raises(ValueError, match=r"`draft` must have the same vocabulary as the model"):
        lm.generate("To be", draft=draft, max_new_tokens=2)


@keras.saving.register_keras_serializable(package="tests")
def registered(ids, logits):
    return -logits


def test_keras_files_omit_unregistered_processors(lm, tmp_path):
    processors = [lambda ids, logits: logits, Ban(3), registered]
    compile_lm(lm, logits_processors=processors, stop_token_ids=None, top_p=0.5)
    with pytest.warns(UserWarning, match=r"`logits_processors` that are not registered .* Ban"):
        lm.save(tmp_path / "lm.keras")
    settings = keras.saving.load_model(tmp_path / "lm.keras").generation_settings
    assert list(settings.logits_processors) == [registered]
    assert settings.top_p == 0.5 and tuple(settings.stop_token_ids) == ()
    compile_lm(lm, logits_processors=processors[:1])
    with pytest.warns(UserWarning, match="compile again"):
        lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras").generation_settings
    assert loaded.processors == () and loaded.stop_token_ids == "auto"
    compile_lm(lm)
