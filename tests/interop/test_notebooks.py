"""Calls of published Keras notebooks about Gemma, with the import changed.

Each test makes the calls of one notebook, in its order, with a built-in or random model in place
of the download and short texts in place of the data. `docs/migration.md` lists the notebooks and
what differs.
"""

import keras
import numpy as np
import pytest

import keras_gemma as keras_hub
from tests.configurations import GEMMA3
from tests.storage.conftest import make_task

pytestmark = pytest.mark.once

PRESET = "gemma_tiny_instruct_en"
TURN = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(autouse=True)
def default_precision():
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def gemma3_preset(tmp_path_factory, tiny_proto):
    folder = tmp_path_factory.mktemp("gemma3") / "preset"
    make_task(GEMMA3 | {"num_layers": 2}, tiny_proto).save_to_preset(folder)
    return folder


def adamw(learning_rate=1e-3):
    optimizer = keras.optimizers.AdamW(learning_rate=learning_rate, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return optimizer


def compile_for_training(gemma_lm, optimizer):
    gemma_lm.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )


class ChatState:
    """A conversation as a string, as several notebooks keep it."""

    def __init__(self, model, system=""):
        self.model, self.system, self.history = model, system, []

    def send_message(self, message):
        self.history.append(f"<start_of_turn>user\n{message}<end_of_turn>\n")
        prompt = "".join(self.history) + "<start_of_turn>model\n"
        if self.system:
            prompt = self.system + "\n" + prompt
        reply = self.model.generate(prompt, max_length=160).replace(prompt, "")
        self.history.append("<start_of_turn>model\n" + reply)
        return reply


def test_get_started(gemma3_preset, capsys):
    """gemma-cookbook: docs/core/keras_inference.ipynb"""
    gemma_lm = keras_hub.models.Gemma3CausalLM.from_preset(gemma3_preset, dtype="bfloat16")
    gemma_lm.summary()
    assert "Total params" in capsys.readouterr().out
    text = gemma_lm.generate("To be", max_length=12)
    assert text.startswith("To be")
    assert len(gemma_lm.generate(["To be", "To die"], max_length=12)) == 2
    prompt = TURN.format("To be?")
    assert gemma_lm.generate(prompt, max_length=24).startswith(prompt)
    gemma_lm.compile(sampler="top_k")
    assert isinstance(gemma_lm.generate("To be", max_length=12), str)
    with pytest.raises(ValueError, match=r"models read text.*'images'"):
        gemma_lm.generate({"images": np.zeros((4, 4, 3)), "prompts": prompt})


def test_lora_of_gemma3(gemma3_preset, capsys):
    """gemma-cookbook: docs/core/lora_tuning.ipynb"""
    gemma_lm = keras_hub.models.Gemma3CausalLM.from_preset(gemma3_preset)
    sampler = keras_hub.samplers.TopKSampler(k=5, seed=2)
    gemma_lm.compile(sampler=sampler)
    assert gemma_lm.generate("To be", max_length=16).startswith("To be")
    data = {"prompts": ["To be?", "To die?"], "responses": ["To sleep.", "To dream."]}
    gemma_lm.backbone.enable_lora(rank=4)
    gemma_lm.summary()
    assert "Trainable params" in capsys.readouterr().out
    gemma_lm.preprocessor.sequence_length = 24
    compile_for_training(gemma_lm, adamw())
    losses = gemma_lm.fit(data, epochs=3, batch_size=1, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    gemma_lm.compile(sampler=keras_hub.samplers.TopKSampler(k=5, seed=2))
    assert gemma_lm.generate("To be", max_length=16).startswith("To be")


def test_chat(capsys):
    """gemma-cookbook: docs/gemma_chat.ipynb and Gemma/[Gemma_2]Keras_Quickstart_Chat.ipynb"""
    keras.utils.set_random_seed(42)
    keras.config.set_floatx("bfloat16")
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    gemma_lm.summary()
    chat = ChatState(gemma_lm, system="Answer in one word.")
    first, second = chat.send_message("What comes after 3?"), chat.send_message("And then?")
    assert first and "<start_of_turn>" not in first + second
    ours = gemma_lm.chat(system="Answer in one word.", max_new_tokens=40)
    assert isinstance(ours.send("What comes after 3?"), str)


def test_code_completion():
    """gemma-cookbook: docs/codegemma/keras_quickstart.ipynb"""
    keras.config.set_floatx("bfloat16")
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    tokenizer = gemma_lm.preprocessor.tokenizer
    names = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", tokenizer.end_token)
    stop_token_ids = tuple(tokenizer.token_to_id(name) for name in names)
    prompt = "{}import {}sys.exit(0){}".format(*names)
    text = gemma_lm.generate(prompt, stop_token_ids=stop_token_ids, max_length=64)
    assert text.startswith(prompt)


class YesNoProbability(keras.layers.Layer):
    def __init__(self, yes, no, **kwargs):
        super().__init__(**kwargs)
        self.yes, self.no = yes, no

    def call(self, logits, padding_mask):
        last = keras.ops.cast(keras.ops.sum(padding_mask, axis=1) - 1, "int32")
        last_logits = keras.ops.take(logits, last, axis=1)[:, 0]
        answers = keras.ops.stack((last_logits[:, self.yes], last_logits[:, self.no]), axis=1)
        return keras.ops.softmax(answers, axis=1)


def test_shield_gemma(tiny_proto):
    """gemma-cookbook: responsible/shieldgemma_on_keras.ipynb

    `ShieldGemma` gives the same probability in one call.
    """
    from keras_gemma.shield_gemma import PROMPT_TEMPLATE, answer_ids

    causal_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET, context_length=1024)
    causal_lm.preprocessor.sequence_length = 512
    yes, no = answer_ids(causal_lm.preprocessor.tokenizer)
    inputs = causal_lm.input
    outputs = YesNoProbability(yes, no)(causal_lm(inputs), inputs["padding_mask"])
    shieldgemma = keras.Model(inputs, outputs)
    policies = {"No Arms": "No arms."}
    prompt = PROMPT_TEMPLATE.format(prompt="Who's there?", policy='"No Arms": No arms.')
    inputs = causal_lm.preprocessor.generate_preprocess([prompt])
    probabilities = shieldgemma.predict(inputs, verbose=0)
    shield = keras_hub.models.ShieldGemma(causal_lm.backbone, causal_lm.preprocessor)
    found = shield.predict("Who's there?", policies)["No Arms"]
    assert found == pytest.approx(probabilities[0][0], rel=1e-3)


def test_agile_classifier():
    """gemma-cookbook: responsible/agile_classifiers.ipynb"""
    keras.utils.set_random_seed(1234)
    model = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    model.preprocessor.sequence_length = 80
    tokenizer = model.preprocessor.tokenizer
    labels = ("a", "b")
    ids = [tokenizer.token_to_id(label) for label in labels]
    assert tokenizer.token_to_id("<unk>") not in ids

    def question(text):
        return f"Classify:[a,b]\n<separator>\nText:{text}\n<separator>\nPrediction:"

    def scores(text):
        preprocessed = model.preprocessor.generate_preprocess([question(text)])
        offset = keras.ops.sum(preprocessed["padding_mask"]) - 1
        logits = model.score(
            token_ids=preprocessed["token_ids"], padding_mask=preprocessed["padding_mask"]
        )[0][offset]
        logits = keras.ops.convert_to_tensor([logits[id] for id in ids])
        return keras.ops.convert_to_numpy(keras.activations.softmax(logits))

    assert scores("love").sum() == pytest.approx(1)
    model.backbone.enable_lora(rank=4)
    texts = [("love", 0), ("hate", 1)] * 2
    train = [question(text) + labels[label] + "<eos>" for text, label in texts]
    compile_for_training(model, keras.optimizers.Adam(learning_rate=0.01))
    losses = model.fit(np.array(train), batch_size=2, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert scores("hate").sum() == pytest.approx(1)


def test_control_vectors():
    """gemma-cookbook: Workshops/[Gemma_2]control_vectors.ipynb

    Hooks of `score` steer in place of the assignment to `backbone.transformer_layers`.
    """
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor.from_preset(PRESET)
    backbone = keras_hub.models.GemmaBackbone.from_preset(PRESET)
    gemma = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)
    layers = [
        layer.output
        for layer in backbone.layers
        if layer.__class__.__name__.endswith("DecoderBlock")
    ]
    hidden = keras.Model(backbone.input, [backbone.output, keras.ops.stack(layers, axis=0)])
    pairs = np.array(["My lord, 1 and 1", "Dude, 1 and 1", "My lord, 2", "Dude, 2"])
    processed = preprocessor(pairs, sequence_length=24)[0]
    last = np.argmin(processed["padding_mask"], axis=-1)
    states = keras.ops.convert_to_numpy(hidden(processed)[1])[:, np.arange(len(pairs)), last]
    differences = states[:, 0::2] - states[:, 1::2]  # [L, pairs, D]
    directions = np.linalg.svd(differences - differences.mean(1, keepdims=True))[2][:, 0]

    with pytest.raises(AttributeError, match=r"hooks=.*residual\.after"):
        backbone.transformer_layers = list(backbone.transformer_layers)

    def steer(x, name):
        steered = x + 20.0 * directions[int(name.split(".")[1])].astype("float32")
        norms = [keras.ops.norm(y, axis=-1, keepdims=True) for y in (x, steered)]
        return steered / norms[1] * norms[0]

    ids = preprocessor.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    plain, texts = len(ids), []
    for hooks in (None, {"block.*.residual.after": steer}):
        text = list(ids)
        for _ in range(3):
            logits = gemma.score(np.array([text]), hooks=hooks)
            text.append(int(keras.ops.argmax(logits[0, -1])))
        texts.append(text[plain:])
    assert texts[0] == gemma.generate([ids], max_new_tokens=3, stop_token_ids=None)[0][plain:]
    assert texts[1] != texts[0]


DISTRIBUTED = """
import keras_gemma as keras_hub, keras
distribution = keras.distribution
devices = distribution.list_devices()
assert len(devices) == 8
mesh = distribution.DeviceMesh((1, 8), ["batch", "model"], devices=devices)
layout_map = distribution.LayoutMap(mesh)
layout_map["token_embedding/embeddings"] = ("model", None)
layout_map["decoder_block.*attention.*(query|key|value).*kernel"] = ("model", None, None)
layout_map["decoder_block.*attention_output.*kernel"] = ("model", None, None)
layout_map["decoder_block.*ffw_gating.*kernel"] = (None, "model")
layout_map["decoder_block.*ffw_linear.*kernel"] = ("model", None)
parallel = distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
distribution.set_distribution(parallel)
gemma_lm = keras_hub.models.GemmaCausalLM.from_preset("gemma_tiny_en")
block = gemma_lm.backbone.get_layer("decoder_block_1")
specs = {v.path.split("/")[-2]: str(v.value.sharding.spec) for v in block.weights}
assert "model" in specs["query"] and "model" in specs["ffw_linear"], specs
gemma_lm.generate("To be", max_length=8)
gemma_lm.backbone.enable_lora(rank=4)
gemma_lm.preprocessor.sequence_length = 16
gemma_lm.compile(
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    optimizer=keras.optimizers.AdamW(learning_rate=5e-5, weight_decay=0.01),
    weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
)
gemma_lm.summary()
gemma_lm.fit(["To be, or not to be", "To die, to sleep"], batch_size=2, epochs=1, verbose=0)
print(gemma_lm.generate("To be", max_length=8))
"""


def test_distributed_tuning(run_on_devices):
    """gemma-cookbook: docs/core/distributed_tuning.ipynb, on 8 simulated devices"""
    assert "To be" in run_on_devices(DISTRIBUTED, 8, JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def test_workshop_of_fine_tuning(tmp_path, capsys):
    """gemma-cookbook: Workshops/Workshop_How_to_Fine_tuning_Gemma.ipynb"""
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    tokenizer = keras_hub.models.GemmaTokenizer.from_preset(PRESET)
    tokens = tokenizer("O Alquimista")
    assert "".join(tokenizer.detokenize(np.array([x])) for x in tokens) == "O Alquimista"
    train = [TURN.format("Write a title") + f"{x}<end_of_turn>" for x in ("Os Maias", "A Sibila")]
    assert all(len(tokenizer(text)) < 64 for text in train)
    gemma_lm.backbone.enable_lora(rank=4)
    gemma_lm.preprocessor.sequence_length = 64
    compile_for_training(gemma_lm, adamw())

    class SaveAndTry(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            gemma_lm.backbone.save_lora_weights(tmp_path / f"epoch{epoch + 1}.lora.h5")
            print(gemma_lm.generate(TURN.format("Write a title"), max_length=40))

    history = gemma_lm.fit(train, epochs=2, batch_size=2, callbacks=[SaveAndTry()], verbose=0)
    assert len(history.history["loss"]) == 2
    assert capsys.readouterr().out.count("Write a title") == 2
    prompt = TURN.format("Write a title")
    tuned = gemma_lm.generate(prompt, max_length=40)
    again = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    again.backbone.enable_lora(rank=4)
    again.backbone.load_lora_weights(tmp_path / "epoch2.lora.h5")
    assert again.generate(prompt, max_length=40) == tuned
    gemma_lm.save_to_preset(tmp_path / "my_gemma2_pt")
    saved = keras_hub.models.GemmaCausalLM.from_preset(tmp_path / "my_gemma2_pt")
    assert saved.generate(prompt, max_length=40) == tuned


def test_lora_and_qlora():
    """keras.io: parameter_efficient_finetuning_of_gemma_with_lora_and_qlora"""
    keras.config.set_dtype_policy("bfloat16")
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor.from_preset(
        PRESET, sequence_length=24
    )
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET, preprocessor=preprocessor)
    gemma_lm.quantize("int8")
    gemma_lm.backbone.enable_lora(rank=4)
    compile_for_training(gemma_lm, keras.optimizers.SGD(learning_rate=1e-4))
    gemma_lm.fit([TURN.format("Hi") + "Hello.<end_of_turn>"] * 2, batch_size=1, verbose=0)
    prompt = TURN.format("Hi")
    assert gemma_lm.generate(prompt, max_length=24).replace(prompt, "") != prompt


def test_function_calling():
    """gemma-cookbook: Gemma/[Gemma_2]Agentic_AI.ipynb; keras.io: function_calling_with_keras_hub"""
    keras.config.set_floatx("bfloat16")
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    prompt = TURN.format("Use the tool `add(a, b)`. What is 1 and 2?")
    response = gemma_lm.generate(prompt, max_length=120)
    assert response.startswith(prompt)
    # `generate` leaves out the <end_of_turn> that ends a reply.
    follow_up = response + "<end_of_turn>\n" + TURN.format("result of add: 3")
    reply = gemma_lm.generate(follow_up, max_length=160, strip_prompt=True)
    assert gemma_lm.generate(follow_up, max_length=160) == follow_up + reply


def test_function_gemma(gemma3_preset):
    """keras.io: function_gemma_with_keras"""
    model = keras_hub.models.Gemma3CausalLM.from_preset(gemma3_preset)
    prompt = (
        "<bos><start_of_turn>developer\n<start_function_declaration>declaration:now{description:"
        "<escape>The time<escape>}<end_function_declaration><end_of_turn>\n" + TURN.format("Now?")
    )
    ids = model.preprocessor.generate_preprocess([prompt], sequence_length=256)["token_ids"][0]
    assert ids.tolist().count(model.preprocessor.tokenizer.start_token_id) == 1
    output = model.generate(prompt, max_length=256, strip_prompt=True)
    assert isinstance(output, str)


def test_hugging_face_checkpoints(tmp_path):
    """keras.io: hugging_face_keras_integration"""
    keras_hub.models.GemmaCausalLM.from_preset(PRESET).export_to_transformers(tmp_path / "hf")
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(tmp_path / "hf")
    text = gemma_lm.generate("I want to say", max_length=30)
    assert text.startswith("I want to say")
    gemma_lm.preprocessor.sequence_length = 16
    gemma_lm.fit(x=["The quick brown fox jumped.", "I forgot."], batch_size=2, verbose=0)
    gemma_lm.save_to_preset(tmp_path / "finetuned")
    keras_hub.models.GemmaCausalLM.from_preset(tmp_path / "finetuned")
    assert callable(keras_hub.upload_preset)


def test_mixed_precision():
    """gemma-cookbook: Gemma/[Gemma_2]Using_with_Mesop.ipynb"""
    keras.config.set_floatx("bfloat16")
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    gemma_lm = keras_hub.models.GemmaCausalLM.from_preset(PRESET)
    prompt = TURN.format("What comes after 3?")
    gemma_lm.preprocessor.sequence_length = 64
    assert gemma_lm.generate(prompt).startswith(prompt)


@pytest.mark.parametrize("trains", ["head", "lora", "quantized"])
def test_text_classification(trains):
    """keras.io: text_classification_with_gemma4, with Gemma 1 and mean pooling"""
    backbone = keras_hub.models.GemmaBackbone.from_preset(PRESET)
    if trains == "quantized":
        backbone.quantize("int8")
    if trains == "lora":
        backbone.enable_lora(rank=4)
    else:
        backbone.trainable = False
    names = ("token_ids", "padding_mask")
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    x = backbone(inputs)
    mask = keras.ops.cast(keras.ops.expand_dims(inputs["padding_mask"], -1), x.dtype)
    x = keras.ops.sum(x * mask, axis=1) / (keras.ops.sum(mask, axis=1) + 1e-8)
    outputs = keras.layers.Dense(1, activation="sigmoid", dtype="float32")(x)
    model = keras.Model(inputs, outputs)
    trained = len(model.trainable_variables)
    assert trained == 2 + len(backbone.trainable_variables)
    assert (trained > 2) == (trains == "lora")
    model.compile(keras.optimizers.Adam(1e-2), loss="binary_crossentropy", metrics=["accuracy"])
    preprocessor = keras_hub.models.GemmaPreprocessor.from_preset(PRESET, sequence_length=8)
    data = preprocessor(["I love it.", "I hate it.", "Love!", "Hate!"])
    labels = np.array([1, 0, 1, 0])
    model.fit(data, labels, epochs=15, verbose=0)
    assert model.evaluate(data, labels, verbose=0)[1] == 1.0
