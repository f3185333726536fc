"""GGUF files, read by the package gguf and run by llama.cpp."""

import sys
import tracemalloc

import numpy as np
import pytest
import sentencepiece
from keras import ops

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaCausalLMPreprocessor, GemmaTokenizer
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.gguf.writer import architecture_of, save_to_gguf
from keras_gemma.text.chat_template import CHAT_TEMPLATE
from keras_gemma.text.pieces import Pieces
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2, VOCABULARY_SIZE
from tests.storage.conftest import IDS, Task, make_backbone, make_task

gguf = pytest.importorskip("gguf", reason="the package gguf writes these files")

# llama.cpp scales queries of gemma2 like the 27B model if there are as many layers.
DEEP = CONFIGURATIONS["gemma2_27b_scale"] | {"num_layers": 46}
CAN = {
    "gemma": ["gemma1_multi_query", "gemma1_multi_head", "gemma1_wide_heads"],
    "gemma2": ["gemma2_grouped", "gemma2_epsilon"],
    "gemma3": ["gemma3"],
}

TOLERANCES = {"bf16": 0.005, "f16": 0.001, "q8_0": 0.02, "q4_0": 0.1}
"""Root mean square of the logits' difference over that of the logits. bf16 and f16 are about the
activations, which llama.cpp rounds to the weights' type before it multiplies."""

TEXTS = [
    "ROMEO:\nWhat light  through yonder   window breaks?",
    "     leading,         long runs  and trailing    ",
    "x \n\n\n\n\n\ny\r\n\tz",
    "12345 67.8",
    "héllo 😀 wörld 日本語 \x00",
    "<start_of_turn>user\n  hi<end_of_turn>\n<start_of_turn>model\n",
    "<mask><unused5> <unused99> <bo s> [@BOS@]",
    "a<bos>b<eos><pad> <unk> c<unk",
    "",
]

PROMPTS = ["LUCIO:\nO, ", "GLOUCESTER:\nO, ", "PROSPERO:\nThe", "PAULINA:"]
"""Prompts after which the built-in model's most likely token is always clear."""
CLEAR = 0.05


@pytest.fixture(scope="module")
def tiny():
    return GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")


@pytest.fixture(scope="module")
def answers(tiny):
    """Prompts and their greedy continuations of 40 tokens."""
    tokenizer = tiny.preprocessor.tokenizer
    prompts = [[tokenizer.start_token_id, *ids.tolist()] for ids in tokenizer.tokenize(PROMPTS)]
    rows = tiny.generate(prompts, max_new_tokens=40)
    for prompt, row in zip(prompts, rows, strict=True):
        best = np.sort(logits_of(tiny.backbone, row)[len(prompt) - 1 : -1], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > CLEAR, "choose prompts with clearer answers"
    new = [row[len(prompt) :] for prompt, row in zip(prompts, rows, strict=True)]
    return dict(zip(PROMPTS, tokenizer.detokenize(new), strict=True))


@pytest.fixture
def llama():
    """Function that opens a file in llama.cpp until the end of the test."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python judges these files")
    opened = []

    def open_file(path):
        opened.append(
            llama_cpp.Llama(
                str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
            )
        )
        return opened[-1]

    yield open_file
    for model in opened:
        model.close()


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def float32_of(tensor):
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def logits_of(backbone, ids):
    ids = np.array([ids])
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    return ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))[0]


def logits_in(model, ids):
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def difference(actual, expected):
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def random_text(seed, length):
    return [2, *np.random.default_rng(seed).integers(5, VOCABULARY_SIZE, length - 1).tolist()]


# What llama.cpp makes of it.


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_llama_cpp_computes_the_same_logits(tiny, llama, tmp_path, dtype):
    save_to_gguf(tiny, tmp_path / "tiny.gguf", dtype)
    ids = random_text(0, 3 * tiny.backbone.sliding_window_size)
    actual = logits_in(llama(tmp_path / "tiny.gguf"), ids)
    assert difference(actual, logits_of(tiny.backbone, ids)) < TOLERANCES[dtype]


def test_llama_cpp_uses_sliding_window(tiny, llama, tmp_path):
    save_to_gguf(tiny, tmp_path / "tiny.gguf", "f16")
    ids = random_text(0, 3 * tiny.backbone.sliding_window_size)
    unlimited = tiny.backbone.config.to_dict() | {"use_sliding_window_attention": False}
    unlimited = GemmaBackbone(**unlimited, dtype="float32")
    weights = tiny.backbone.named_weights()
    for name, weight in unlimited.named_weights().items():
        weight.assign(weights[name].numpy())
    actual = logits_in(llama(tmp_path / "tiny.gguf"), ids)
    assert difference(actual, logits_of(tiny.backbone, ids)) < TOLERANCES["f16"]
    assert difference(actual, logits_of(unlimited, ids)) > 100 * TOLERANCES["f16"]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_llama_cpp_generates_the_same_text(tiny, answers, llama, tmp_path, dtype):
    save_to_gguf(tiny, tmp_path / "tiny.gguf", dtype)
    model = llama(tmp_path / "tiny.gguf")
    for prompt, answer in answers.items():
        completion = model.create_completion(
            prompt, max_tokens=40, temperature=0.0, repeat_penalty=1.0
        )
        assert completion["choices"][0]["text"] == answer


@pytest.mark.parametrize("special", [True, False])
def test_llama_cpp_tokenizes_the_same(tiny, llama, tmp_path, special):
    save_to_gguf(tiny, tmp_path / "tiny.gguf")
    model = llama(tmp_path / "tiny.gguf")
    tokenizer = tiny.preprocessor.tokenizer
    for text in TEXTS:
        ids = tokenizer.tokenize(text, parse_special=special).tolist()
        encoded = model.tokenize(text.encode(), add_bos=True, special=special)
        assert encoded == [tokenizer.start_token_id, *ids], repr(text)
        assert model.detokenize(ids, special=True).decode() == text


def test_llama_cpp_renders_the_chat_template(tiny, llama, tmp_path):
    save_to_gguf(tiny, tmp_path / "tiny.gguf")
    model = llama(tmp_path / "tiny.gguf")
    assert model.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    answer = model.create_chat_completion(
        [{"role": "user", "content": "Speak, speak."}], max_tokens=8, temperature=0.0
    )
    expected = tiny.generate(
        "<start_of_turn>user\nSpeak, speak.<end_of_turn>\n<start_of_turn>model\n",
        max_new_tokens=8,
        strip_prompt=True,
    )
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    "configuration",
    [
        *(pytest.param(CONFIGURATIONS[name], id=name) for names in CAN.values() for name in names),
        pytest.param(DEEP, id="gemma2_27b_scale"),
        pytest.param(GEMMA2 | {"use_sliding_window_attention": False}, id="gemma2_no_window"),
    ],
)
def test_llama_cpp_computes_every_variant(configuration, tiny_proto, llama, tmp_path):
    task = make_task(configuration, tiny_proto)
    save_to_gguf(task, tmp_path / "tiny.gguf", "f16")
    model = llama(tmp_path / "tiny.gguf")
    for ids in IDS.tolist():
        # Rounding adds up over the 46 layers of one of them.
        limit = TOLERANCES["f16"] * max(2, configuration["num_layers"] / 4)
        assert difference(logits_in(model, ids), logits_of(task.backbone, ids)) < limit


def test_llama_cpp_accepts_more_rows_than_tokens(tiny_proto, llama, tmp_path):
    task = make_task(GEMMA1 | {"vocabulary_size": VOCABULARY_SIZE + 64}, tiny_proto)
    save_to_gguf(task, tmp_path / "tiny.gguf", "f16")
    model = llama(tmp_path / "tiny.gguf")
    assert model.n_vocab() == VOCABULARY_SIZE + 64
    assert model.tokenize(b"To be", add_bos=False) == (
        task.preprocessor.tokenizer.tokenize("To be").tolist()
    )


# Content of the file.


@pytest.mark.parametrize(
    ("architecture", "name"), [(key, name) for key, names in CAN.items() for name in names]
)
def test_bf16_file_has_every_weight(architecture, name, tiny_proto, tmp_path):
    task = make_task(CONFIGURATIONS[name], tiny_proto, dtype="bfloat16")
    save_to_gguf(task, tmp_path / "tiny.gguf", "bf16")
    stored = tensors_of(tmp_path / "tiny.gguf")

    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture.upper()]]
    layers = range(task.backbone.config.num_layers)
    expected = {gguf.TENSOR_NAMES[k].format(bid=i) + ".weight" for k in kinds for i in layers}
    assert set(stored) == expected - {"output.weight"}  # the embedding is the head too

    weights = task.backbone.named_weights()
    for ours, theirs in {
        "token_embedding": "token_embd",
        "layers.1.query": "blk.1.attn_q",
        "layers.1.output": "blk.1.attn_output",
        "layers.1.down": "blk.1.ffn_down",
    }.items():
        tensor = stored[f"{theirs}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
        np.testing.assert_array_equal(float32_of(tensor), weights[ours].numpy().astype("float32"))
    for ours, theirs in {
        "final_norm": "output_norm",
        "layers.0.pre_attention_norm": "blk.0.attn_norm",
        "layers.0.pre_ffw_norm": "blk.0.ffn_norm",
    }.items():
        tensor = stored[f"{theirs}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(tensor.data, 1 + weights[ours].numpy().astype("float32"))


def test_indivisible_rows_stay_float16(tiny_proto, tmp_path):
    task = make_task(CONFIGURATIONS["gemma1_wide_heads"], tiny_proto)  # D 48, N * H 64, F 48
    save_to_gguf(task, tmp_path / "tiny.gguf", "q4_0")
    kinds = {
        name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "tiny.gguf").items()
    }
    assert kinds["blk.0.attn_output.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "F16"


def test_embedding_of_q4_0_file_is_q8_0(tiny_proto, tmp_path):
    save_to_gguf(make_task(GEMMA1, tiny_proto), tmp_path / "tiny.gguf", "q4_0")
    stored = tensors_of(tmp_path / "tiny.gguf")
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert stored["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"


def test_context_length_in_config(tiny, tmp_path):
    save_to_gguf(tiny, tmp_path / "tiny.gguf")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    assert fields["gemma2.context_length"].contents() == 256


def test_vocabulary(tiny_proto, tmp_path):
    task = make_task(GEMMA1 | {"vocabulary_size": VOCABULARY_SIZE + 2}, tiny_proto)
    save_to_gguf(task, tmp_path / "tiny.gguf")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    types = [gguf.TokenType(t).name for t in fields["tokenizer.ggml.token_type"].contents()]
    assert len(tokens) == len(scores) == len(types) == len(set(tokens)) == VOCABULARY_SIZE + 2
    assert types[-2:] == ["UNUSED", "UNUSED"]

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny_proto)
    user_defined = [i for i, kind in enumerate(types) if kind == "USER_DEFINED"]
    for i in range(VOCABULARY_SIZE):
        written = pieces.id_to_piece(i)
        assert tokens[i] == (written.replace("▁", " ") if i in user_defined else written)
        assert scores[i] == pytest.approx(pieces.get_score(i))
        assert (types[i] == "BYTE") == pieces.is_byte(i)
        assert (types[i] == "UNKNOWN") == pieces.is_unknown(i)
    named = Pieces(tiny_proto).control_tokens
    control = {tokens[i]: i for i, kind in enumerate(types) if kind in ("CONTROL", "UNKNOWN")}
    assert control == named
    assert {"<bos>", "<start_of_turn>", "<mask>"} <= set(control)
    assert {"\n\n", "   "} <= {tokens[i] for i in user_defined}


def test_tensors_are_converted_one_at_a_time(tiny_proto, tmp_path):
    sizes = GEMMA1 | {"num_layers": 12, "hidden_dim": 128, "intermediate_dim": 1024}
    task = make_task(sizes, tiny_proto)
    save_to_gguf(task, tmp_path / "tiny.gguf", "f16")  # imports
    tracemalloc.start()
    save_to_gguf(task, tmp_path / "tiny.gguf", "f16", overwrite=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "tiny.gguf").stat().st_size / 4


# What goes wrong.


def test_interrupted_save_keeps_earlier_file(tiny_proto, tmp_path, monkeypatch):
    task = make_task(GEMMA1, tiny_proto)
    path = tmp_path / "made" / "tiny.gguf"
    save_to_gguf(task, path)
    earlier = path.read_bytes()
    write = gguf.GGUFWriter.write_tensor_data
    written = []

    def interrupted(writer, tensor, *args):
        written.append(tensor)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(writer, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_to_gguf(task, path, "f16", overwrite=True)
    assert path.read_bytes() == earlier
    assert list(path.parent.iterdir()) == [path]


def test_weight_beyond_float16(tiny_proto, tmp_path):
    task = make_task(GEMMA1, tiny_proto)
    weight = task.backbone.named_weights()["layers.0.gate"]
    weight.assign(np.full(weight.shape, 1e5, "float32"))
    with pytest.raises(ValueError, match=r"layers\.0\.gate .*100000.*bf16"):
        save_to_gguf(task, tmp_path / "tiny.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_post_ffw_norm": False}, "gemma2, the closest, needs use_post_ffw_norm=True"),
        ({"attention_logit_soft_cap": None}, "needs an attention_logit_soft_cap"),
        ({"final_logit_soft_cap": None}, "needs a final_logit_soft_cap"),
        ({"query_head_dim_normalize": False, "hidden_dim": 48}, r"1/sqrt\(8\) at 4 layers"),
        (DEEP | {"query_head_dim_normalize": True}, r"1/sqrt\(12\) at 46 layers"),
    ],
)
def test_models_without_architecture(changes, text):
    with pytest.raises(ValueError, match=text):
        architecture_of(GemmaConfig(**GEMMA2 | changes))


def test_vaultgemma_is_refused(tiny_proto, tmp_path):
    task = make_task(CONFIGURATIONS["vaultgemma"], tiny_proto)
    with pytest.raises(ValueError, match="use_sliding_window_attention=False"):
        save_to_gguf(task, tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tiny_proto, tmp_path):
    task = make_task(GEMMA1, tiny_proto)
    with pytest.raises(ValueError, match=r"`dtype` must be one of 'bf16'.*'int8'"):
        save_to_gguf(task, tmp_path / "tiny.gguf", "int8")
    with pytest.raises(ValueError, match=r"`path` must name a file that ends in \.gguf"):
        save_to_gguf(task, tmp_path / "tiny.bin")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match="not a folder"):
        save_to_gguf(task, tmp_path / "folder.gguf")
    with pytest.raises(ValueError, match="no preprocessor"):
        save_to_gguf(Task(task.backbone), tmp_path / "tiny.gguf")
    small = make_backbone(GEMMA1 | {"vocabulary_size": VOCABULARY_SIZE - 1})
    with pytest.raises(ValueError, match="512 ids, but the backbone's vocabulary_size is 511"):
        save_to_gguf(Task(small, task.preprocessor), tmp_path / "tiny.gguf")
    empty = Task(task.backbone, GemmaCausalLMPreprocessor(GemmaTokenizer()))
    with pytest.raises(ValueError, match="no vocabulary"):
        save_to_gguf(empty, tmp_path / "tiny.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.gguf"]


@pytest.mark.parametrize("module", ["gguf", "sentencepiece.sentencepiece_model_pb2"])
def test_missing_packages(module, tiny_proto, tmp_path, monkeypatch):
    task = make_task(GEMMA1, tiny_proto)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    with pytest.raises(ImportError, match=r'gguf and protobuf.* "\.\[gguf\]"'):
        save_to_gguf(task, tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []
