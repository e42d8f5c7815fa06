"""The target of a load test: a server's URL, the model behind it, and what the server declares of the model.

endpoint, Endpoint    a URL taken apart, for anything that answers HTTP
discover, Target      a model on an Open Inference Protocol server, over HTTP or gRPC
Interface             its inputs and outputs; `Shape` and `read_shapes` for what the server leaves open
"""

from rushhour.load.target.discovery import discover, is_cascade
from rushhour.load.target.endpoint import Endpoint, endpoint
from rushhour.load.target.interface import DeclaredInput, Interface, Shape, read_shapes
from rushhour.load.target.model import Target

__all__ = [
    "DeclaredInput",
    "Endpoint",
    "Interface",
    "Shape",
    "Target",
    "discover",
    "endpoint",
    "is_cascade",
    "read_shapes",
]
