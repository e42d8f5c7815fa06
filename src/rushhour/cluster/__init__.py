"""A Plan beyond this machine: a container context, a compose file, and manifests for KServe."""

from rushhour.cluster.container import check_context, packages_of, write_context
from rushhour.cluster.deployment import Deployment, default_name, memory_of
from rushhour.cluster.manifests import compose_file, is_manifest, kserve_file

__all__ = [
    "Deployment",
    "check_context",
    "compose_file",
    "default_name",
    "is_manifest",
    "kserve_file",
    "memory_of",
    "packages_of",
    "write_context",
]
