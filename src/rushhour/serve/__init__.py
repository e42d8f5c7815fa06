"""The data plane: requests in, batches through the engine, answers out. One process, no queue between processes."""

from rushhour.serve.guard import Keys, Limits
from rushhour.serve.server import serve
from rushhour.serve.settings import ServeSettings
from rushhour.serve.target import Target, open_target

__all__ = ["Keys", "Limits", "ServeSettings", "Target", "open_target", "serve"]
