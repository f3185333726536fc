"""A backbone's adapters by name: made, chosen, merged and deleted.

While there are any, the base is frozen, and the adapter that is on is what trains. Files are
`storage/`'s.
"""

import random
from typing import Any

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.lora.config import Lora
from keras_gemma.lora.low_rank import first_a
from keras_gemma.model.linear import Linear
from keras_gemma.model.quantizable import check_not_in_fit, forget_training, let_go

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
"""A `[r, in]` and B `[out, r]` by the name of their matrix."""


class Adapters:
    """The adapters of one backbone.

    Args:
        backbone: a `GemmaBackbone`.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.known: dict[str, Lora] = {}
        self.active: str | None = None
        self._base: dict[str, np.ndarray] | None = None  # what stood where an adapter is merged
        self._frozen: list[keras.Variable] = []

    @property
    def merged(self) -> bool:
        """Whether the adapter that is on stands in the matrices themselves."""
        return self._base is not None

    @property
    def added(self) -> str | None:
        """The adapter whose products are added while the model runs."""
        return None if self.merged else self.active

    def linears(self, name: str) -> dict[str, Linear]:
        """The layers that an adapter is beside, by the names of their matrices."""
        holders = self.backbone.holders()
        return {matrix: holders[matrix] for matrix in self.known[name].sizes}

    def variables(self) -> list[keras.Variable]:
        """A and B of all adapters."""
        pairs = [
            linear.low_ranks[name] for name in self.known for linear in self.linears(name).values()
        ]
        return [variable for pair in pairs for variable in (pair.a, pair.b)]

    def add(self, name: str, lora: Lora, arrays: Arrays | None = None) -> None:
        """Make an adapter and put it on.

        Args:
            arrays: what it holds; None is untrained: A is random and B is 0.

        Raises:
            ValueError: a name that is taken or none, or an adapter is merged.
        """
        self.check_name(name)
        backbone = self.backbone
        if not self.known:
            self._frozen = [variable for variable in backbone.weights if variable.trainable]
        for model in (backbone, *backbone.around):
            if not model.trainable:
                model.trainable = True  # the flag alone: `_changed` says what of it is trained
        self.known[name] = lora
        for matrix, linear in self.linears(name).items():
            linear.add_low_rank(name, lora.sizes[matrix][0], lora.scale(matrix), lora.dtype)
        for block in backbone.transformer_layers if lora.dropout else ():
            block.add_lora_seed()
        for matrix, (a, b) in (arrays or {}).items():
            backbone.holders()[matrix].low_ranks[name].assign(a, b)
        self.active = name
        self._changed()

    def begin(self, name: str, seed: int | None) -> None:
        """Fill A of an adapter with what training starts from, alike on every backend."""
        # Where there is no seed, from Python's, which `keras.utils.set_random_seed` sets too.
        generator = np.random.default_rng(random.randrange(2**32) if seed is None else seed)
        for linear in self.linears(name).values():
            low_rank = linear.low_ranks[name]
            low_rank.a.assign(first_a(tuple(low_rank.a.shape), generator))

    def check_name(self, name: str) -> None:
        """Raise a ValueError where no adapter called `name` can be added."""
        self._check_not_merged("add an adapter")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                "`name` must be one word of letters, digits and _, as it is a part of the names of "
                f"variables. Received: name={name!r}"
            )
        if name in self.known:
            raise ValueError(
                f"The model has an adapter {name!r} already ({self.known[name].describe()}). Pass "
                f"another `name`, or `delete_adapter({name!r})` first."
            )

    def choose(self, name: str | None) -> None:
        """Put an adapter on, or with None all off.

        Raises:
            ValueError: an unknown name, or an adapter is merged.
        """
        self._check_not_merged("choose another")
        if name is not None:
            self.check_known(name)
        self.active = name
        self._changed()

    def delete(self, name: str) -> None:
        """Let an adapter go; with the last one, the base is trained again as it was before.

        Raises:
            ValueError: an unknown name, or an adapter is merged.
        """
        self._check_not_merged("delete an adapter")
        self.check_known(name)
        for linear in self.linears(name).values():
            linear.added = None
            linear.remove_low_rank(name)
        del self.known[name]
        if self.active == name:
            self.active = None
        self._changed()

    def merge(self, keep_base: bool) -> None:
        """Add the adapter that is on into the matrices themselves.

        Raises:
            ValueError: none is on, one is merged, the model is quantized, or the adapter holds
                numbers that are not finite.
        """
        self._check_not_merged("merge")
        quantization = self.backbone.quantization
        if quantization is not None:
            raise ValueError(
                f"The matrices are {quantization.describe()}, which cannot take an adapter in "
                "without loss. Load the model in floating point, `load_lora` and merge there; or "
                "`save_to_hugging_face`, which writes the merged model in floating point."
            )
        name = self.check_on()
        check_finite(self.arrays(name), f"The adapter {name!r}")
        weights = self.backbone.named_weights()
        base = {}
        for matrix in self.known[name].sizes:
            weight = weights[matrix]
            merged = weight.numpy()
            if keep_base:
                base[matrix] = np.array(keras.ops.convert_to_numpy(weight.variable.value))
            weight.assign(merged)
        self._base = base if keep_base else None
        for known in () if keep_base else list(self.known):
            self.delete(known)
        self._changed()

    def unmerge(self) -> None:
        """Put back the matrices as they were.

        Raises:
            ValueError: nothing is merged.
        """
        check_not_in_fit([self.backbone, *self.backbone.around], "unmerge")
        if self._base is None:
            raise ValueError(
                "No adapter is merged. `merge_lora` merges the one that is on, and with "
                "`keep_base=False` it keeps nothing to go back to: load the model again."
            )
        weights = self.backbone.named_weights()
        for matrix, array in self._base.items():
            backend.assign(weights[matrix].variable, array)
        self._base = None
        self._changed()

    def arrays(self, name: str) -> Arrays:
        """What an adapter holds, float32."""
        return {m: linear.low_ranks[name].numpy() for m, linear in self.linears(name).items()}

    def check_on(self, name: str | None = None) -> str:
        """`name`, or by default the adapter that is on.

        Raises:
            ValueError: there is none.
        """
        name = self.active if name is None else name
        if name is not None:
            self.check_known(name)
            return name
        how = (
            f"`set_adapter` puts one of {self.listed()} on"
            if self.known
            else "`enable_lora` makes one, `load_lora` reads one"
        )
        raise ValueError(f"No adapter is on: {how}.")

    def check_known(self, name: Any) -> None:
        """Raise a ValueError where no adapter is called `name`."""
        if not isinstance(name, str) or name not in self.known:
            raise ValueError(
                f"The model has no adapter {name!r}; it has {self.listed()}. `enable_lora` makes "
                "one, `load_lora` reads one."
            )

    def check_quantizable(self) -> None:
        """Raise a ValueError where the matrices are not the base's."""
        self._check_not_merged("quantize")

    def base_is_quantized(self) -> None:
        """Be told that the base's matrices are others now, none of which is ever trained."""
        self._frozen = []

    def check_trainable(self) -> None:
        """Raise a ValueError where there are adapters and none can be trained."""
        if self.merged:
            raise ValueError(
                f"The adapter {self.active!r} is merged, so training it would change nothing: "
                "`unmerge_lora()` first."
            )
        if self.known and self.active is None:
            raise ValueError(
                "Nothing of this model can be trained: its base is frozen, and no adapter is on. "
                f"`set_adapter` puts one of {self.listed()} on; without adapters, "
                "`delete_adapter`, the base is trained."
            )

    def check_plain(self) -> None:
        """Raise a ValueError where matrices in 8 or 4 bits would have to take an adapter in."""
        if self.added is not None and self.backbone.quantization is not None:
            raise ValueError(
                f"The adapter {self.added!r} is on, and a preset of a quantized model has no place "
                "for it. Save the adapter by `save_lora` and the base after `set_adapter(None)`; "
                "or `save_to_hugging_face`, which writes both as one in floating point."
            )

    def check_exportable(self) -> None:
        """Raise a ValueError where an adapter stands beside the matrices."""
        if self.added is not None:
            raise ValueError(
                f"The adapter {self.added!r} is on, and an export holds plain matrices alone: "
                "`merge_lora()` first, or `set_adapter(None)` for the base. Where those are in 8 "
                "or 4 bits, load the model in floating point, and export with `quantization`."
            )

    def listed(self) -> str:
        """The names, for a message."""
        return ", ".join(map(repr, self.known)) or "none"

    def describe(self) -> str:
        """A line for a summary; empty without adapters."""
        if not self.known:
            return ""
        state = "merged" if self.merged else "on"
        parts = [
            f"{name!r}, {lora.describe()}{f' ({state})' if name == self.active else ''}"
            for name, lora in self.known.items()
        ]
        trained = sum(int(np.prod(v.shape)) for v in self.backbone.trainable_variables)
        total = self.backbone.config.parameter_count
        share = f"{trained:,} numbers are trained, {trained / total:.2%} of the base's {total:,}"
        return f" LoRA: {'; '.join(parts)}; {share}"

    def to_dict(self) -> dict[str, Any] | None:
        """Names and settings as JSON. Merged adapters are no adapters any more to a file."""
        if not self.known or self.merged:
            return None
        known = {name: lora.to_dict() for name, lora in self.known.items()}
        return {"active": self.active, "adapters": known}

    def restore(self, values: dict[str, Any] | None) -> None:
        """Make the adapters that `to_dict` told of, with zeros in them."""
        if values is None:
            return
        for name, settings in values["adapters"].items():
            self.add(name, Lora.from_dict(settings))
        self.choose(values["active"])

    def _check_not_merged(self, verb: str) -> None:
        check_not_in_fit([self.backbone, *self.backbone.around], verb)
        if self.merged:
            raise ValueError(
                f"The adapter {self.active!r} is merged: `unmerge_lora()` before you {verb}."
            )

    def _changed(self) -> None:
        """Tell the layers which adapter is added, and every variable whether it is trained.

        What Keras compiled for `fit`, `evaluate` and `predict` is compiled anew; programs that
        generate and score take the adapter as an argument.
        """
        trained = {id(variable) for variable in self._frozen} if not self.known else set()
        for name, holder in self.backbone.holders().items():
            if not isinstance(holder, Linear):
                continue
            here = self.active is not None and name in self.known[self.active].sizes
            holder.added = self.added if here else None
            holder.saves_low_ranks = not self.merged
            if holder.added is not None:
                low_rank = holder.low_ranks[holder.added]
                trained |= {id(low_rank.a), id(low_rank.b)}
        for block in self.backbone.transformer_layers:
            block.lora_dropout = self.known[self.active].dropout if self.active else 0.0
        for variable in self.backbone.weights:
            variable.trainable = id(variable) in trained
        for model in (self.backbone, *self.backbone.around):
            let_go(model)
            forget_training(model)


def check_finite(arrays: Arrays, what: str) -> None:
    """Raise a ValueError where an adapter holds numbers that are not finite, and name all."""
    bad = [
        f"{matrix} {part}"
        for matrix, pair in arrays.items()
        for part, array in zip(("A", "B"), pair, strict=True)
        if not np.isfinite(array).all()
    ]
    if bad:
        raise ValueError(
            f"{what} holds numbers that are not finite, in {', '.join(bad[:20])}"
            f"{' and others' if len(bad) > 20 else ''}. Train it again with a smaller learning "
            "rate, or go back to an earlier one."
        )
