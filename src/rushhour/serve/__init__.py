"""The data plane: requests in, batches through the engine, answers out. One process, no queue between processes.

What is named here is imported when it is first used: a program that serves must hear signals before that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rushhour.serve.protocols.limits import Keys, Limits
    from rushhour.serve.server import serve
    from rushhour.serve.settings import ServeSettings
    from rushhour.serve.target import Target, open_target

__all__ = ["Keys", "Limits", "ServeSettings", "Target", "open_target", "serve"]

_HOMES = {
    "Keys": "protocols.limits",
    "Limits": "protocols.limits",
    "ServeSettings": "settings",
    "Target": "target",
    "open_target": "target",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
