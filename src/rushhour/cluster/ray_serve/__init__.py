"""The same Plan on Ray Serve: each replica owns a whole `rushhour serve` process, on the node that it runs on.

Importing it needs the extra `cluster` for nothing; using it does.
"""

from rushhour.cluster.ray_serve.head import connected, stop
from rushhour.cluster.ray_serve.order import Order, read_ports, read_replicas
from rushhour.cluster.ray_serve.packing import digest, pack, plan_of
from rushhour.cluster.ray_serve.registry import Replicated
from rushhour.cluster.ray_serve.rollout import State, delete, deploy, status, undo

__all__ = [
    "Order",
    "Replicated",
    "State",
    "connected",
    "delete",
    "deploy",
    "digest",
    "pack",
    "plan_of",
    "read_ports",
    "read_replicas",
    "status",
    "stop",
    "undo",
]
