"""Adapters of a backbone: adding, activating, merging and deleting them.

While a backbone has adapters, its base is frozen and only the active adapter is trained. Knows
nothing about files.
"""

import random
from typing import Any

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.lora.config import Lora, read_lora
from keras_gemma.lora.low_rank import init_lora_a
from keras_gemma.model.linear import Linear
from keras_gemma.model.trainable import check_not_in_fit, release_variables, reset_training

DEFAULT_NAME = "default"
"""Default name of an adapter."""

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
"""A `[r, in]` and B `[out, r]` by the name of the adapted matrix."""


class Adapters:
    """Adapters of one backbone."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.configs: dict[str, Lora] = {}
        self.active: str | None = None
        self._base: dict[str, np.ndarray] | None = None  # the matrices before a merge
        self.base_variables: list[keras.Variable] = []  # trained again without adapters

    @property
    def merged(self) -> bool:
        """True if the active adapter is merged into the base."""
        return self._base is not None

    @property
    def applied(self) -> str | None:
        """Name of the adapter that is applied in the forward pass, or `None`."""
        return None if self.merged else self.active

    def linears(self, name: str) -> dict[str, Linear]:
        """Returns the layers that an adapter changes, by the names of their matrices."""
        layers = self.backbone.weight_layers()
        return {matrix: layers[matrix] for matrix in self.configs[name].sizes}

    def variables(self) -> list[keras.Variable]:
        """Returns A and B of all adapters."""
        return [
            variable
            for name in self.configs
            for linear in self.linears(name).values()
            for variable in (linear.low_ranks[name].a, linear.low_ranks[name].b)
        ]

    def enable(self, name: str, seed: int | None, *settings: Any) -> None:
        """Adds and activates an adapter with the settings of `read_lora`, and initializes its A."""
        self.add(name, read_lora(self.backbone.config, *settings))
        # Without a seed, Python's generator, which `keras.utils.set_random_seed` also seeds.
        generator = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
        for linear in self.linears(name).values():
            low_rank = linear.low_ranks[name]
            low_rank.a.assign(init_lora_a(tuple(low_rank.a.shape), generator))

    def add(self, name: str, lora: Lora, arrays: Arrays | None = None) -> None:
        """Adds and activates an adapter. Without arrays, A and B are zero."""
        self.check_name(name)
        backbone = self.backbone
        if not self.configs:
            self.base_variables = [variable for variable in backbone.weights if variable.trainable]
        for model in (backbone, *backbone.wrapping_models):
            if not model.trainable:
                model.trainable = True  # only the flag: `_changed` sets it for each variable
        self.configs[name] = lora
        for matrix, linear in self.linears(name).items():
            linear.add_low_rank(name, lora.sizes[matrix][0], lora.scale(matrix), lora.dtype)
        for block in backbone.transformer_layers if lora.dropout else ():
            block.add_lora_seed()
        for matrix, (a, b) in (arrays or {}).items():
            backbone.weight_layers()[matrix].low_ranks[name].assign(a, b)
        self.active = name
        self._changed()

    def check_name(self, name: str) -> None:
        """Raises a ValueError if an adapter with this name cannot be added."""
        self.check_not_merged("add an adapter")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                "`name` must be one word of letters, digits and _, because variable names contain "
                f"it. Received: name={name!r}"
            )
        if name in self.configs:
            raise ValueError(
                f"The model already has an adapter {name!r} ({self.configs[name].describe()}). "
                f"Pass another `name`, or call `delete_adapter({name!r})` first."
            )

    def activate(self, name: str | None) -> None:
        """Activates an adapter. `None` deactivates all adapters."""
        self.check_not_merged("activate another adapter")
        if name is not None:
            self.check_known(name)
        self.active = name
        self._changed()

    def delete(self, name: str) -> None:
        """Deletes an adapter. Deleting the last one makes the base trainable again, as before."""
        self.check_not_merged("delete an adapter")
        self.check_known(name)
        for linear in self.linears(name).values():
            linear.applied = None
            linear.remove_low_rank(name)
        del self.configs[name]
        if self.active == name:
            self.active = None
        self._changed()

    def merge(self, keep_base: bool) -> None:
        """Merges the active adapter into the base; permanently, unless `keep_base`."""
        self.check_not_merged("merge")
        quantization = self.backbone.quantization
        if quantization is not None:
            raise ValueError(
                f"The base model is quantized ({quantization.describe()}), and merging into it "
                "would lose precision. Load the model in floating point, then call `load_lora` and "
                "`merge_lora`; or call `save_to_hugging_face`, which writes the merged model in "
                "floating point."
            )
        name = self.active_name()
        check_finite(self.arrays(name), f"The adapter {name!r}")
        weights = self.backbone.named_weights()
        base = {}
        for matrix in self.configs[name].sizes:
            weight = weights[matrix]
            merged = weight.numpy()
            if keep_base:
                base[matrix] = np.array(keras.ops.convert_to_numpy(weight.variable.value))
            weight.assign(merged)
        self._base = base if keep_base else None
        for adapter in () if keep_base else list(self.configs):
            self.delete(adapter)
        self._changed()

    def unmerge(self) -> None:
        """Restores the matrices from before `merge`."""
        check_not_in_fit(self.backbone, "unmerge")
        if self._base is None:
            raise ValueError(
                "No adapter is merged. `merge_lora` merges the active adapter. A merge with "
                "`keep_base=False` cannot be undone: load the model again."
            )
        weights = self.backbone.named_weights()
        for matrix, array in self._base.items():
            backend.assign(weights[matrix].variable, array)
        self._base = None
        self._changed()

    def arrays(self, name: str) -> Arrays:
        """Returns A and B of each matrix of an adapter, in float32."""
        return {m: linear.low_ranks[name].numpy() for m, linear in self.linears(name).items()}

    def active_name(self, name: str | None = None) -> str:
        """Returns `name`, or the active adapter if `name` is `None`. The adapter exists."""
        name = self.active if name is None else name
        if name is not None:
            self.check_known(name)
            return name
        advice = (
            f"Activate one of {self.listed()} with `set_adapter`."
            if self.configs
            else "Add one with `enable_lora`, or load one with `load_lora`: the model has no "
            "lora-enabled layers."
        )
        raise ValueError(f"No adapter is active. {advice}")

    def check_known(self, name: Any) -> None:
        """Raises a ValueError if no adapter has this name."""
        if not isinstance(name, str) or name not in self.configs:
            raise ValueError(
                f"Unknown adapter. The model has {self.listed()}. Add an adapter with "
                f"`enable_lora`, or load one with `load_lora`. Received: {name!r}"
            )

    def check_trainable(self) -> None:
        """Raises a ValueError if there are adapters but none can be trained."""
        if self.merged:
            raise ValueError(
                f"The adapter {self.active!r} is merged, so training it would have no effect. Call "
                "`unmerge_lora()` first."
            )
        if self.configs and self.active is None:
            raise ValueError(
                "The model has no trainable variables: its base is frozen and no adapter is "
                f"active. Activate one of {self.listed()} with `set_adapter`, or delete all "
                "adapters with `delete_adapter` to train the base."
            )

    def check_plain(self) -> None:
        """Raises a ValueError if an active adapter cannot be merged into a quantized base."""
        if self.applied is not None and self.backbone.quantization is not None:
            raise ValueError(
                f"The adapter {self.applied!r} is active, and a preset of a quantized model cannot "
                "hold an adapter. Save the adapter with `save_lora` and the base after "
                "`set_adapter(None)`; or call `save_to_hugging_face`, which writes the merged "
                "model in floating point."
            )

    def check_exportable(self) -> None:
        """Raises a ValueError if an adapter is active and not merged."""
        if self.applied is not None:
            raise ValueError(
                f"The adapter {self.applied!r} is active, and an export cannot hold adapters. Call "
                "`merge_lora()` first, or `set_adapter(None)` to export the base. If the base is "
                "quantized, load the model in floating point and export with `quantization`."
            )

    def listed(self) -> str:
        """Returns the names of the adapters, for a message."""
        return ", ".join(map(repr, self.configs)) or "none"

    def describe(self) -> str:
        """Returns a line for a model summary, empty without adapters."""
        if not self.configs:
            return ""
        state = "merged" if self.merged else "active"
        parts = [
            f"{name!r}, {lora.describe()}{f' ({state})' if name == self.active else ''}"
            for name, lora in self.configs.items()
        ]
        trained = sum(int(np.prod(v.shape)) for v in self.backbone.trainable_variables)
        total = self.backbone.config.parameter_count
        share = f"{trained:,} trainable parameters ({trained / total:.2%} of the base's {total:,})"
        return f" LoRA: {'; '.join(parts)}; {share}"

    def to_dict(self) -> dict[str, Any] | None:
        """Returns names and settings for JSON; `None` without adapters or if one is merged."""
        if not self.configs or self.merged:
            return None
        adapters = {name: lora.to_dict() for name, lora in self.configs.items()}
        return {"active": self.active, "adapters": adapters}

    def restore(self, values: dict[str, Any] | None) -> None:
        """Adds the adapters of a `to_dict` result, filled with zeros."""
        if values is None:
            return
        for name, settings in values["adapters"].items():
            self.add(name, Lora.from_dict(settings))
        self.activate(values["active"])

    def check_not_merged(self, verb: str) -> None:
        check_not_in_fit(self.backbone, verb)
        if self.merged:
            raise ValueError(
                f"The adapter {self.active!r} is merged. Call `unmerge_lora()` before you {verb}."
            )

    def _changed(self) -> None:
        """Updates the applied adapter of each layer and `trainable` of each variable."""
        trained = {id(variable) for variable in self.base_variables} if not self.configs else set()
        for name, layer in self.backbone.weight_layers().items():
            if not isinstance(layer, Linear):
                continue
            is_target = self.active is not None and name in self.configs[self.active].sizes
            layer.applied = self.applied if is_target else None
            layer.saves_low_ranks = not self.merged
            layer.merges_updates = not self.configs
            if layer.applied is not None:
                low_rank = layer.low_ranks[layer.applied]
                trained |= {id(low_rank.a), id(low_rank.b)}
        for block in self.backbone.transformer_layers:
            block.lora_dropout = self.configs[self.active].dropout if self.active else 0.0
        for variable in self.backbone.weights:
            variable.trainable = id(variable) in trained
        release_variables(self.backbone)
        reset_training(self.backbone)


def check_finite(arrays: Arrays, what: str) -> None:
    """Raises a ValueError that names the matrices of an adapter that contain NaN or infinity."""
    bad = [
        f"{matrix} {part}"
        for matrix, pair in arrays.items()
        for part, array in zip(("A", "B"), pair, strict=True)
        if not np.isfinite(array).all()
    ]
    if bad:
        raise ValueError(
            f"{what} contains NaN or infinity in {', '.join(bad[:20])}"
            f"{' and others' if len(bad) > 20 else ''}. Train it again with a smaller learning "
            "rate, or use an earlier checkpoint."
        )
