"""Training, evaluating and predicting on strings, in every container."""

import threading

import keras
import numpy as np
import pytest
from keras import ops

from tests.conftest import TEXTS
from tests.models import logits_of, make_lm, on_torch

SETTINGS = {"epochs": 1, "verbose": 0}


@pytest.fixture(scope="module")
def lm(tiny_proto):
    """Model whose weights change between tests."""
    lm = make_lm(proto=tiny_proto, sequence_length=16, num_layers=1)
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    return lm


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.epochs = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return TEXTS[2 * index : 2 * index + 2]

    def on_epoch_end(self):
        self.epochs += 1


def data_set():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(TEXTS[:6]).batch(2)


def loader():
    import torch

    return torch.utils.data.DataLoader(TEXTS[:6], batch_size=2)


def generator():
    for i in (0, 2, 4, 0, 2, 4):
        yield TEXTS[i : i + 2]


CONTAINERS = {
    "list": lambda: TEXTS[:6],
    "tuple": lambda: tuple(TEXTS[:6]),
    "array": lambda: np.array(TEXTS[:6]),
    "data_set": data_set,
    "py_dataset": Batches,
    "loader": loader,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(lm, name):
    arguments = {"batch_size": 2} if name in ("list", "tuple", "array") else {}
    x, y, weights = lm.preprocessor(TEXTS[:6])
    expected = lm.evaluate(x, y, sample_weight=weights, batch_size=2, verbose=0)
    result = lm.evaluate(CONTAINERS[name](), **arguments, verbose=0)
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    history = lm.fit(CONTAINERS[name](), **arguments, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]
    assert "sparse_categorical_accuracy" in history
    logits = lm.predict(CONTAINERS[name](), **arguments, verbose=0)
    assert logits.shape == (6, 16, 512)


def test_a_generator(lm):
    history = lm.fit(generator(), steps_per_epoch=3, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


def test_a_loader_keeps_its_order(lm):
    seen = []

    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            for i in (0, 2, 4):
                seen.append(i)
                yield TEXTS[i : i + 2]

    lm.predict(Loader(), verbose=0)
    lm.fit(Loader(), epochs=3, verbose=0)
    passes = "".join(map(str, seen)).split("0")
    assert passes.count("24") >= 4 and not any(p not in ("", "2", "24") for p in passes)


def test_on_epoch_end_is_passed_on(lm):
    batches = Batches()
    lm.fit(batches, epochs=2, verbose=0)
    assert batches.epochs >= 1


@pytest.mark.parametrize("name", ["list", "data_set", "py_dataset"])
def test_validation_data(lm, name):
    history = lm.fit(
        TEXTS[:2], batch_size=2, validation_data=CONTAINERS[name](), validation_batch_size=2,
        **SETTINGS,
    ).history  # fmt: skip
    expected = lm.evaluate(TEXTS[:6], batch_size=2, return_dict=True, verbose=0)
    np.testing.assert_allclose(history["val_loss"], [expected["loss"]], rtol=1e-4)


def test_validation_split(lm):
    history = lm.fit(TEXTS[:4], batch_size=2, validation_split=0.25, **SETTINGS).history
    expected = lm.evaluate(TEXTS[3:4], batch_size=2, return_dict=True, verbose=0)
    np.testing.assert_allclose(history["val_loss"], [expected["loss"]], rtol=1e-4)


def test_loss_ignores_padding(lm):
    x, y, weights = lm.preprocessor(TEXTS[:2], sequence_length=40)
    loss = lm.evaluate(x, y, sample_weight=weights, batch_size=2, return_dict=True, verbose=0)
    losses = ops.convert_to_numpy(
        lm.score(x["token_ids"], x["padding_mask"], scoring_mode="loss", target_ids=y)
    )
    # Keras's own average is over all positions, those of weight 0 included.
    np.testing.assert_allclose(loss["loss"], (losses * weights).sum() / weights.size, rtol=1e-3)


def test_ids_in_arrays(lm):
    x, y, weights = lm.preprocessor(TEXTS[:6])
    history = lm.fit(x, y, batch_size=2, sample_weight=weights, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


def test_one_batch(lm):
    losses = [float(lm.train_on_batch(TEXTS[:2])[0]) for _ in range(3)]
    assert losses[2] < losses[0]
    assert np.isfinite(losses).all()


def test_batches_of_strings(lm):
    inputs = lm.preprocessor(TEXTS[:2])
    losses = []
    for batch in ((TEXTS[:2],), inputs):
        lm.reset_metrics()  # Keras 3.13 continues the means of earlier tests.
        losses.append(lm.test_on_batch(*batch)[0])
    np.testing.assert_allclose(*losses, rtol=1e-6)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(lm.predict_on_batch(TEXTS[:2])),
        lm.predict(TEXTS[:2], verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "verb",
    [
        "fit",
        "evaluate",
        "predict",
        "train_on_batch",
        "test_on_batch",
        "predict_on_batch",
    ],
)
def test_a_single_string_is_refused(lm, verb):
    with pytest.raises(ValueError, match=r"Pass a list of strings.*'To be'"):
        getattr(lm, verb)("To be")


def test_labels_with_strings_are_refused(lm):
    with pytest.raises(ValueError, match="next tokens of the text"):
        lm.fit(TEXTS[:2], np.zeros((2, 16)), **SETTINGS)


def test_generation_after_training_uses_the_new_weights(tiny_proto):
    lm = make_lm(proto=tiny_proto, sequence_length=24)
    before = lm.generate("To be, or", stop_token_ids=None)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), run_eagerly=on_torch())
    lm.fit(TEXTS[:1] * 2, batch_size=2, epochs=25, verbose=0)
    after = lm.generate("To be, or", stop_token_ids=None)
    assert after != before
    assert after.startswith("To be, or not to be")
    (row,) = lm.generate([[2, 300, 301]], max_new_tokens=9, stop_token_ids=None)
    assert row[3:] == logits_of(lm, row).argmax(-1)[2:-1].tolist()


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    # Keras's Adam makes no progress in plain bfloat16, which rounds its `beta_2` of 0.999 to 1.
    [("mixed_bfloat16", keras.optimizers.Adam), ("bfloat16", keras.optimizers.SGD)],
)
def test_half_precision(dtype, optimizer, tiny_proto):
    lm = make_lm(proto=tiny_proto, dtype=dtype, sequence_length=16, num_layers=1)
    lm.compile(optimizer=optimizer(1e-2))
    history = lm.fit(TEXTS[:2], batch_size=2, epochs=3, verbose=0).history
    assert history["loss"][2] < history["loss"][0]


def test_other_threads_get_logits_during_a_step(lm):
    ids = np.full((1, 4), 7, "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    shapes = []
    with lm._omit_head():
        thread = threading.Thread(target=lambda: shapes.append(lm(inputs).shape))
        thread.start()
        thread.join()
        shapes.append(lm(inputs).shape)
    config = lm.backbone.config
    assert [shape[-1] for shape in shapes] == [config.vocabulary_size, config.hidden_dim]


@pytest.mark.once
@pytest.mark.parametrize(
    "inputs", [[{"role": "user", "content": "a"}], [[2, 5], [2]], [2, 5], [("a", "b")]]
)
def test_lists_of_other_things_than_strings(lm, inputs):
    with pytest.raises(TypeError, match=r"A list must have strings.*chat_dataset.*padding_mask"):
        lm.fit(inputs)
