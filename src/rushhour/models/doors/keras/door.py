"""Keras: `.keras` files of Keras 3, `.h5` files of Keras 2 and 3, and models in memory."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

import onnx

from rushhour.bundle import Preprocessing
from rushhour.errors import ModelError
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.doors.keras.child import graph_from_child
from rushhour.models.doors.keras.exporting import answers_of, graph_of, inputs_of
from rushhour.models.doors.keras.files import describe, is_model_file
from rushhour.models.doors.keras.loading import TORCH, keras_module, load
from rushhour.models.doors.scaling import own_scaling
from rushhour.system.extras import require

_RANDOM: Final = "Random"


class KerasDoor:
    """Files are told by their first bytes. Lambda layers and layers of others are refused before Keras sees them."""

    takes = "a .keras or .h5 file of Keras, or a keras.Model"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By its first bytes, or its type."""
        if isinstance(model, Path):
            return model.is_file() and is_model_file(model)
        return any(
            kind.__name__ == "Model" and kind.__module__.partition(".")[0] in ("keras", "tf_keras")
            for kind in type(model).__mro__
        )

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its graph, exported by torch; in another process where Keras has another backend here."""
        require("keras")
        described = describe(model) if isinstance(model, Path) else None
        if described is None and any(kind.__module__.startswith("tf_keras") for kind in type(model).__mro__):
            raise ModelError(
                f"cannot import {opening.shown}", "it is a model of Keras 2", "save it as .h5, and import that file"
            )
        keras = keras_module()
        on_torch = keras.backend.backend() == TORCH
        graph = None if on_torch else _from_elsewhere(keras, model, opening)  # a file is checked there, so before
        original = model if described is None else load(model, described)
        inputs = inputs_of(keras, original, opening)
        if graph is None:
            graph = graph_of(keras, original, inputs, opening)
        layers = [type(layer).__name__ for layer in getattr(original, "layers", ())]
        if described is not None:
            layers = list(described.layers)
        version = keras.__version__ if described is None else described.version or "2"
        scaling = own_scaling(graph, opening.name)
        return Arrival(
            "keras",
            graph,
            origin=f"Keras {version}, {len(layers)} layers",
            answers=answers_of(keras, original, inputs),
            preprocessing=Preprocessing() if scaling else None,
            preprocessing_from=f"the model scales its samples itself: {scaling}" if scaling else "",
            notes=_notes(layers),
        )


def _from_elsewhere(keras: Any, model: Any, opening: Opening) -> onnx.ModelProto:
    """The graph from another process, where this one has Keras on another backend."""
    with tempfile.TemporaryDirectory(prefix="rushhour-") as folder:
        file = model
        if not isinstance(model, Path):
            file = Path(folder) / "model.keras"
            try:
                model.save(file)
                describe(file)
            except ModelError as error:
                raise ModelError(
                    f"cannot import {opening.shown}",
                    f"Keras runs on {keras.backend.backend()} here, and {error.why}",
                    "set KERAS_BACKEND=torch before Keras is imported",
                ) from error
        return graph_from_child(file, opening, Path(folder))


def _notes(layers: list[str]) -> tuple[str, ...]:
    counts = Counter(layers)
    notes = []
    dropouts = sum(count for name, count in counts.items() if "Dropout" in name or "Noise" in name)
    if dropouts:
        notes.append(f"{dropouts} layers of dropout or noise are left out: a graph has none")
    augmenting = sum(count for name, count in counts.items() if name.startswith(_RANDOM))
    if augmenting:
        notes.append(f"{augmenting} layers of augmentation are left out: use --augment in training")
    return tuple(notes)
