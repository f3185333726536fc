"""Layer with one matrix without bias, and its LoRA updates."""

from typing import Any

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.backend import keras_internals
from keras_gemma.lora.low_rank import LowRank, merge_update
from keras_gemma.model.matrix import MatrixLayer, matmul


@keras.saving.register_keras_serializable(package="keras_gemma")
class Linear(MatrixLayer):
    """Layer with one matrix `[out, in]`: `x [..., in]` -> `[..., out]`.

    The variable has the backend's layout; files and `NamedWeight` use `[out, in]`. Each adapter of
    the model may add one low-rank update, of which at most one is applied.
    """

    def __init__(self, out_dim: int, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(quantization, **kwargs)
        self.out_dim = out_dim
        self.low_ranks: dict[str, LowRank] = {}
        self.applied: str | None = None
        self.saves_low_ranks = True
        self.merges_updates = True  # of a file; False if the model has adapters

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.add_matrix((self.out_dim, input_shape[-1]))
        self.built = True

    def call(self, x: Any) -> Any:
        return matmul(x, self.tensor)

    @property
    def tensor(self) -> Any:
        """Packed matrix in the compute dtype or quantized; `LoraWeight` if an update is applied."""
        packed = super().tensor
        if self.applied is None:
            return packed
        return self.low_ranks[self.applied].with_lora(packed, self.compute_dtype)

    def adapted(self, matrix: np.ndarray) -> np.ndarray:
        """Returns `matrix [out, in]` merged with the applied update."""
        return matrix if self.applied is None else self.low_ranks[self.applied].merged_with(matrix)

    def add_low_rank(self, name: str, rank: int, scale: float, dtype: str) -> None:
        """Creates the variables of an update, filled with zeros. The update is not applied yet."""
        out, length = self.logical_shape
        options = {"initializer": "zeros", "dtype": dtype, "autocast": False}
        with keras_internals.adding_weights(self):
            a = self.add_weight(name=f"{name}_lora_a", shape=(rank, length), **options)
            b = self.add_weight(name=f"{name}_lora_b", shape=(out, rank), **options)
        self.low_ranks[name] = LowRank(a, b, scale)

    def remove_low_rank(self, name: str) -> None:
        low_rank = self.low_ranks.pop(name)
        keras_internals.untrack(self, low_rank.a)
        keras_internals.untrack(self, low_rank.b)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        for name, low_rank in self.low_ranks.items() if self.saves_low_ranks else ():
            for part, array in zip(_parts(name), low_rank.numpy(), strict=True):
                store[part] = array
            scale = low_rank.scale if name == self.applied else 0.0
            store[name + _SCALE] = np.array(scale, "float32")

    def load_own_variables(self, store: Any) -> None:
        keys = list(store.keys())
        stored = {key[: -len(_A)] for key in keys if key.endswith(_A)}
        scales = {name: np.array(store[name + _SCALE]) for name in stored if name + _SCALE in keys}
        if self.merges_updates and self.quantization is None and set(scales) == stored:
            super().load_own_variables(store)
            self._add_updates(store, scales)
            return
        if stored != set(self.low_ranks):
            raise ValueError(
                f"{self.path}: the file has the adapters {sorted(stored)}, but the model has "
                f"{sorted(self.low_ranks)}. First add adapters with `enable_lora` and the same "
                "settings, or delete adapters with `delete_adapter`."
            )
        super().load_own_variables(store)
        for name, low_rank in self.low_ranks.items():
            low_rank.assign(*(np.array(store[part]) for part in _parts(name)))

    def _add_updates(self, store: Any, scales: dict[str, np.ndarray]) -> None:
        """Merges the updates of a file, as Keras does for a model without them."""
        if not any(scales.values()):
            return
        matrix = self.numpy()
        for name, scale in scales.items():
            a, b = (np.array(store[part], "float32") for part in _parts(name))
            matrix = merge_update(matrix, a, b, float(scale))
        variable = self.variables_of_matrix
        backend.assign(variable, backend.pack(matrix, self.kind, variable.dtype))

    def compute_output_spec(self, x: Any) -> keras.KerasTensor:
        return keras.KerasTensor((*x.shape[:-1], self.out_dim), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "out_dim": self.out_dim}


_A, _B, _SCALE = ".lora_a", ".lora_b", ".lora_scale"
"""Ends of names in a file: the arrays of an update, and its scale, 0 if it is not applied."""


def _parts(name: str) -> tuple[str, str]:
    """Returns the names of A and B of an adapter in a file."""
    return name + _A, name + _B
