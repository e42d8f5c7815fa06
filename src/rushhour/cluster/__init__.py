"""A Plan beyond this machine: machines that a rate takes, a container context, a compose file, manifests for KServe."""

from rushhour.cluster.container import check_context, packages_of, write_context
from rushhour.cluster.deployment import Deployment, default_name, memory_of
from rushhour.cluster.manifests import compose_file, is_manifest, kserve_file
from rushhour.cluster.sizing import Node, Sizing, read_node, size

__all__ = [
    "Deployment",
    "Node",
    "Sizing",
    "check_context",
    "compose_file",
    "default_name",
    "is_manifest",
    "kserve_file",
    "memory_of",
    "packages_of",
    "read_node",
    "size",
    "write_context",
]
