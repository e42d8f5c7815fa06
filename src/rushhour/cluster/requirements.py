"""The packages that a server of certain bundles imports, pinned to the versions installed here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from rushhour.errors import EngineError
from rushhour.plan import EngineName

_SERVING = ("click", "httptools", "msgspec", "numpy", "prometheus-client", "safetensors", "uvloop")
_PICTURES, _TEXTS = "pillow", "tokenizers"
_GRPC = ("grpcio", "protobuf")
_NEVER_IMPORTED = frozenset(
    {
        "openvino-telemetry",  # see rushhour.system.telemetry
        "huggingface-hub",  # of tokenizers, which download
        *("flatbuffers", "packaging", "protobuf"),  # of ONNX Runtime's tools, which convert models
    }
)
"""Required by other packages, for parts of them that a server does not use."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def requirements_of(
    engines: Iterable[EngineName], *, pictures: bool = False, texts: bool = False, grpc: bool = False
) -> tuple[str, ...]:
    """`name==version` of every package that a server needs beside Rushhour, sorted.

    They are meant for `pip install --no-deps`: what the packages require for parts that a server does not use is left
    out.

    Args:
        engines: that run the variants.
        pictures: whether encoded pictures are decoded.
        texts: whether texts are tokenised.
        grpc: whether it is served over gRPC.

    Raises:
        EngineError: if one of them is not installed here.
    """
    chosen = [*_SERVING, *engines, *[_PICTURES] * pictures, *[_TEXTS] * texts, *(_GRPC if grpc else ())]
    needed = frozenset(chosen)
    found: dict[str, str] = {}
    while chosen:
        name = chosen.pop()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            if name not in needed:
                continue  # for another platform, or another version of Python
            raise EngineError(
                f"the package {name} is not installed",
                "a server of this Plan imports it, and the container gets the version that is installed here",
                f"install it with `pip install {name}`",
            ) from error
        found[name] = installed.version
        required = (_required(line) for line in installed.requires or ())
        chosen += [other for other in required if other and (other in needed or other not in _NEVER_IMPORTED)]
    return tuple(f"{name}=={found[name]}" for name in sorted(found))


def _required(line: str) -> str:
    """The name of a required package, in its normal form (PEP 503); empty where an extra requires it."""
    requirement, _, condition = line.partition(";")
    name = _NAME.match(requirement.strip())
    return "" if name is None or "extra" in condition else re.sub(r"[-_.]+", "-", name[0]).lower()
