"""The extras of the package: a base installation serves and loads, and each of the others adds packages.

train      networks, data and their training: torch
compress   pruning and quantisation, and with them tuning; includes train and report
report     HTML reports and charts
keras      models of Keras become bundles; includes train
hf         folders of Hugging Face transformers become models; includes train
tabular    tables are data; estimators of scikit-learn, LightGBM and XGBoost become models; includes train
cluster    runs are deployed on Ray Serve
video      frames of videos are data
all        train, compress and report
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Final

from rushhour.errors import InstallError

EXTRAS: Final = {
    "train": ("torch", "kornia", "onnx", "onnxscript", "optuna", "tensorboard"),
    "compress": ("nncf", "torch_pruning"),
    "report": ("jinja2", "matplotlib"),
    "keras": ("keras", "h5py"),
    "hf": ("transformers",),
    "cluster": ("ray", "starlette", "aiohttp"),
    "video": ("av",),
    "tabular": ("sklearn", "joblib", "skl2onnx", "onnxmltools", "pyarrow"),
}
"""Extra -> the modules of its packages."""
_INCLUDED: Final = {"compress": ("train", "report"), "keras": ("train",), "hf": ("train",), "tabular": ("train",)}


def require(*extras: str) -> None:
    """Raise unless all packages of these extras are installed.

    Raises:
        InstallError: naming the first package that is missing, and the extra that has it.
    """
    for extra in extras:
        for name in _modules(extra):
            if importlib.util.find_spec(name) is None:
                raise _missing(name, extra)


def explain_missing(errors: Iterable[BaseException]) -> InstallError | None:
    """What to install where one of these errors is the failed import of a package of an extra; else None."""
    for error in errors:
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
        if extra is not None:
            return _missing(name, extra)
    return None


def _modules(extra: str) -> tuple[str, ...]:
    return tuple(name for each in (*_INCLUDED.get(extra, ()), extra) for name in EXTRAS[each])


def _missing(name: str, extra: str) -> InstallError:
    return InstallError(
        f"the package {name.replace('_', '-')} is not installed",
        f"this needs Rushhour's extra {extra}",
        f"install it with `pip install 'rushhour[{extra}]'`",
    )
