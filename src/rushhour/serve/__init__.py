"""The inference server: requests in, batches through the engine, answers out, in one process per cell.

Names are imported when they are first used: a program that serves must handle signals before that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rushhour.serve.access.keys import Keys
    from rushhour.serve.hosting import Folder, hosted
    from rushhour.serve.limits import Limits
    from rushhour.serve.server import serve
    from rushhour.serve.settings import Served, ServeSettings
    from rushhour.serve.target import Target, is_target, may_be_model, open_target

__all__ = [
    "Folder",
    "Keys",
    "Limits",
    "ServeSettings",
    "Served",
    "Target",
    "hosted",
    "is_target",
    "may_be_model",
    "open_target",
    "serve",
]

_MODULES = {
    "Folder": "hosting",
    "Keys": "access.keys",
    "Limits": "limits",
    "ServeSettings": "settings",
    "Served": "settings",
    "Target": "target",
    "hosted": "hosting",
    "is_target": "target",
    "may_be_model": "target",
    "open_target": "target",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
