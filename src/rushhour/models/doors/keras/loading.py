"""Keras 3 on torch, and a model of its own layers from a checked file."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

from rushhour.errors import ModelError
from rushhour.models.doors.keras.files import Described
from rushhour.models.failure import why_failed

TORCH: Final = "torch"
_BACKEND: Final = "KERAS_BACKEND"


def keras_module() -> Any:
    """Keras 3, on torch where this process has not imported it yet. The environment is left as it was.

    Raises:
        ModelError: if it is Keras 2.
    """
    if "keras" not in sys.modules:
        before = os.environ.get(_BACKEND)
        os.environ[_BACKEND] = TORCH
        try:
            import keras
        finally:
            if before is None:
                del os.environ[_BACKEND]
            else:
                os.environ[_BACKEND] = before
    import keras

    version = str(keras.__version__)
    if version.startswith("2."):
        raise ModelError(
            "cannot use this Keras", f"it is {version}, and 3 is needed", "install it with `pip install 'keras>=3'`"
        )
    return keras


def load(file: Path, described: Described) -> Any:
    """The model of a file that `describe` has checked; without its optimizer.

    Raises:
        ModelError: if Keras cannot load it.
    """
    keras = keras_module()
    with tempfile.TemporaryDirectory(prefix="rushhour-") as folder:
        path = file
        if file.suffix != described.suffix:  # Keras goes by the name
            path = Path(folder) / f"model{described.suffix}"
            path.symlink_to(file.absolute())
        try:
            given = {"custom_objects": _of_keras_2(keras)} if described.suffix == ".h5" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how a model should be written
                if keras.backend.backend() == TORCH:
                    with keras.device("meta"):  # fails before memory is taken for weights that the file does not have
                        keras.saving.load_model(path, compile=False, safe_mode=True, **given)
                model = keras.saving.load_model(path, compile=False, safe_mode=True, **given)
        except Exception as error:  # Keras has errors of every kind
            raise ModelError(
                f"cannot load {file}",
                f"Keras {keras.__version__} says: {why_failed(error)}",
                "load it with the Keras that wrote it, and export it to ONNX or as a SavedModel there",
            ) from error
    return model


_GROUPS: Final = ("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D", "Conv1DTranspose")
_DROPPED: Final[dict[str, dict[str, Any]]] = {
    **{name: {"groups": 1} for name in (*_GROUPS, "Conv2DTranspose", "Conv3DTranspose")},
    **{name: {"time_major": False} for name in ("LSTM", "GRU", "SimpleRNN", "RNN")},
}
"""Layer -> settings in files of Keras 2 that Keras 3 does not know, with the only value that it can compute."""


def _of_keras_2(keras: Any) -> dict[str, Any]:
    """Layers that take the settings of Keras 2, by their name."""
    return {name: _without(getattr(keras.layers, name), settings) for name, settings in _DROPPED.items()}


def _without(kind: Any, dropped: dict[str, Any]) -> Any:
    """A layer that takes settings, and leaves them out."""

    class Taking(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            for name, value in dropped.items():
                if settings.pop(name, value) != value:
                    raise ValueError(f"{kind.__name__} of Keras 3 has no {name}")
            super().__init__(*args, **settings)

    Taking.__name__ = kind.__name__
    return Taking
