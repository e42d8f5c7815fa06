"""The description of a Keras model, JSON, checked before Keras sees it: it names only what is Keras' own."""

from __future__ import annotations

import json
from typing import Any, Final

from rushhour.errors import ModelError
from rushhour.models.doors.keras.vocabulary import (
    ACTIVATIONS,
    CORE_OPERATIONS,
    LAYERS,
    MODELS,
    MODULES,
    OPERATIONS,
    PARTS,
    VALUES,
    WHY,
)

LARGEST: Final = 64_000_000
"""Bytes of a description."""
_MOST_OBJECTS: Final = 20_000
_REMEDY: Final = "in Python, load it yourself and give the model: rushhour.import_model(model, out=...)"


def read_description(text: bytes, shown: str) -> dict[str, Any]:
    """The description of a model.

    Args:
        text: JSON.
        shown: names the model in messages.

    Raises:
        ModelError: if it cannot be read, or names what Keras does not have or what runs code.
    """
    try:
        described = json.loads(text)
        if not isinstance(described, dict) or not isinstance(described.get("config"), dict):
            raise ValueError("it describes no model")
    except (ValueError, RecursionError) as error:
        raise _refused(shown, f"its description cannot be read: {error}") from error
    described.pop("compile_config", None)  # of training: losses and metrics of the user's own are not needed
    _check(described, shown)
    return described


def layers_of(described: dict[str, Any]) -> list[str]:
    """The classes of the layers of a model, in order, with those of models inside it."""
    found: list[str] = []
    config = described.get("config")
    layers = config.get("layers", []) if isinstance(config, dict) else []
    for layer in layers:
        found += layers_of(layer) if layer["class_name"] in MODELS else [str(layer["class_name"])]
    return [each for each in found if each != "InputLayer"]


def _check(described: dict[str, Any], shown: str) -> None:
    pending: list[Any] = [described]
    count = 0
    while pending:
        each = pending.pop()
        if isinstance(each, list):
            pending += each
        elif isinstance(each, dict):
            count += 1
            if count > _MOST_OBJECTS:
                raise _refused(shown, f"it has more than {_MOST_OBJECTS:,} parts")
            if "class_name" in each:
                _check_object(each, shown)
            pending += each.values()


def _check_object(each: dict[str, Any], shown: str) -> None:
    """Raise unless an object of the description is one of Keras' own that runs no code."""
    kind, module, registered = each["class_name"], each.get("module"), each.get("registered_name")
    if not isinstance(kind, str) or not isinstance(module, str | None) or not isinstance(registered, str | None):
        raise _refused(shown, "its description is damaged")
    if kind in WHY:
        raise _refused(shown, f"its layer {kind} is not taken: {WHY[kind]}")
    if kind == "function":
        name = each.get("config")
        if name not in ACTIVATIONS or registered not in (None, name):
            raise _refused(shown, f"its function {name} is none of Keras' activations", _REMEDY)
        return
    if kind in VALUES:
        return
    own = module is None or module in MODULES or module.removeprefix("tensorflow.") in MODULES
    known = kind in LAYERS or kind in MODELS or kind in PARTS or kind.replace("_", "").lower() in _LOWER
    if (module in OPERATIONS and kind.isidentifier()) or (module == "keras.src.ops.core" and kind in CORE_OPERATIONS):
        known = own = True
    if not known or not own or (registered not in (None, kind) and not registered.startswith("Functional")):
        name = kind if module is None or own else f"{module}.{kind}"
        raise _refused(shown, f"its layer {name} is none of Keras' own, and code of others is not loaded", _REMEDY)


_LOWER: Final = frozenset(name.lower() for name in PARTS)
"""Old files write `glorot_uniform`."""


def _refused(shown: str, why: str, fix: str = "save the model without it, or export it to ONNX") -> ModelError:
    return ModelError(f"will not load {shown}", why, fix)
