"""Rushhour finds, proves and runs the fastest way to serve a deep-learning model to many users.

    import rushhour

    tuned = rushhour.tune("mynet:build", "photos/", out="runs/photos", slo="p99<50ms", max_accuracy_drop="1%")
    with rushhour.serve(tuned, http_port=0) as server:
        print(rushhour.load(server, slo="p99<50ms").headline)

The verbs are `train`, `compress`, `tune`, `serve`, `load`, `compare`, `report`, `export`, `deploy`, `size` and
`import_model`; `help(rushhour.tune)` explains one. All but `compare`, `export`, `deploy`, `size` and `import_model` are
packages as well: `from rushhour.train import TrainSettings` works beside `rushhour.train(...)`. `deployed` finds a
deployment by its name. `load_module` gives a bundle's torch module. The vocabulary (`SLO`, `Plan`, `Bundle`, ...) is
importable from here.

Everything named here is imported when it is first used: `import rushhour` is cheap.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rushhour.api import (
        compare,
        compress,
        deploy,
        deployed,
        export,
        import_model,
        load,
        load_module,
        report,
        serve,
        size,
        train,
        tune,
    )
    from rushhour.bundle import Bundle
    from rushhour.clock import Clock, VirtualClock, WallClock
    from rushhour.errors import RushhourError
    from rushhour.goal import SLO, AccuracyBudget, Goal, Workload
    from rushhour.measurement import Measurement, Outcome
    from rushhour.plan import Plan, Policy, Variant
    from rushhour.task import Task

__all__ = [
    "SLO",
    "AccuracyBudget",
    "Bundle",
    "Clock",
    "Goal",
    "Measurement",
    "Outcome",
    "Plan",
    "Policy",
    "RushhourError",
    "Task",
    "Variant",
    "VirtualClock",
    "WallClock",
    "Workload",
    "compare",
    "compress",
    "deploy",
    "deployed",
    "export",
    "import_model",
    "load",
    "load_module",
    "report",
    "serve",
    "size",
    "train",
    "tune",
]

_HOMES = {
    "SLO": "goal",
    "AccuracyBudget": "goal",
    "Bundle": "bundle",
    "Clock": "clock",
    "Goal": "goal",
    "Measurement": "measurement",
    "Outcome": "measurement",
    "Plan": "plan",
    "Policy": "plan",
    "RushhourError": "errors",
    "Task": "task",
    "Variant": "plan",
    "VirtualClock": "clock",
    "WallClock": "clock",
    "Workload": "goal",
    "compare": "api",
    "deploy": "api",
    "deployed": "api",
    "export": "api",
    "import_model": "api",
    "load_module": "api",
    "size": "api",
}
_VERB_PACKAGES = ("compress", "load", "report", "serve", "train", "tune")


class _VerbPackage(ModuleType):
    """A package that is a verb as well: calling `rushhour.tune` calls `rushhour.api.tune`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(import_module("rushhour.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self._function)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        from inspect import getdoc

        function = self._function
        summary, _, rest = (getdoc(function) or "").partition("\n\n")
        return (
            f"{summary}\n\n{_call(function)}\n\n{rest}\n\n"
            f"The package {self.__name__}: {self.__dict__.get('__doc__') or ''}"
        )


class _Rushhour(ModuleType):
    """This package; it makes the package of a verb callable when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERB_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)


def _call(function: Any) -> str:
    """`rushhour.NAME(...)` with one parameter on a line, as `help` shows it."""
    from inspect import signature

    lines, found = [], signature(function)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    return "\n".join([f"rushhour.{function.__name__}(", *lines, f") -> {found.return_annotation}"])


def __getattr__(name: str) -> Any:
    if name in _VERB_PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Rushhour
