"""The context of a container that serves a Plan: `docker build DIR`.

Dockerfile          two stages: packages are installed in the first, the second has nothing else
install.sh          what the first stage runs: installs into one folder, removes what no server opens
requirements.txt    every package that this server imports, pinned
wheels/             this Rushhour
run/                plan.json and the bundles that it serves
export.json         what was exported: names, ports, cores, memory, and every file of the folder
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from rushhour.bundle import Text
from rushhour.cluster.deployment import Deployment, write_run
from rushhour.cluster.requirements import requirements_of
from rushhour.cluster.wheel import write_wheel
from rushhour.errors import StorageError
from rushhour.plan import PLAN
from rushhour.system.storage import building, check_own, explained

_DOCKERFILE: Final = "Dockerfile"
_INSTALL: Final = "install.sh"
_REQUIREMENTS: Final = "requirements.txt"
_WHEELS: Final = "wheels"
_RUN: Final = "run"
_EXPORT: Final = "export.json"
_NAMES: Final = (_DOCKERFILE, _INSTALL, _REQUIREMENTS, _WHEELS, _RUN, _EXPORT)
_ROOT: Final = "/opt/rushhour"
USER: Final = "10001:10001"
"""Of the process in the container. A number: Kubernetes cannot tell whether a name is root."""

_UNUSED: Final = {
    "openvino": (
        "openvino/libs/libopenvino_intel_gpu_plugin.so",
        "openvino/libs/libopenvino_intel_npu_plugin.so",
        "openvino/libs/libopenvino_*_compiler*.so",
        "openvino/libs/cache.json",
        "openvino/libs/libopenvino_gguf_frontend.so*",
        "openvino/libs/libopenvino_jax_frontend.so*",
        "openvino/libs/libopenvino_paddle_frontend.so*",
        "openvino/libs/libopenvino_pytorch_frontend.so*",
        "openvino/libs/libopenvino_tensorflow_frontend.so*",
        "openvino/libs/libopenvino_tensorflow_lite_frontend.so*",
        "openvino/include",
    ),
    "onnxruntime": (
        "onnxruntime/capi/libonnxruntime.so*",  # for programs in C; the module has all of it
        "onnxruntime/datasets",
        "onnxruntime/quantization",
        "onnxruntime/tools",
        "onnxruntime/transformers",
    ),
    "numpy": (
        "numpy/*/tests",
        "numpy/tests",
        "numpy/f2py",
        "numpy/distutils",
        "numpy/_core/lib",
        "numpy/_core/include",
    ),
    "pillow": (  # fonts, colour profiles, AVIF; a server reads JPEG, PNG and WebP
        *("PIL/_avif*.so", "PIL/_imagingcms*.so", "PIL/_imagingft*.so", "PIL/_imagingtk*.so"),
        *("pillow.libs/libavif*", "pillow.libs/libbrotli*", "pillow.libs/libfreetype*", "pillow.libs/libharfbuzz*"),
        *("pillow.libs/liblcms2*", "pillow.libs/libpng16*"),
    ),
    "uvloop": ("uvloop/*.c", "uvloop/*.pyx", "uvloop/*.pxd", "uvloop/handles"),
}
"""Of each package, the files that no server on CPUs opens: other devices, other formats, tests, tools."""

_HEALTH: Final = (
    "import http.client; c = http.client.HTTPConnection('127.0.0.1', {port}, timeout=4); "
    "c.request('GET', '/v2/health/ready'); raise SystemExit(c.getresponse().status != 200)"
)


def packages_of(deployment: Deployment) -> tuple[str, ...]:
    """The pinned requirements of a deployment's container.

    Raises:
        EngineError: if one of them is not installed here.
    """
    bundles = [bundle for _, bundle in deployment.bundles]
    return requirements_of(
        dict.fromkeys(variant.engine for variant, _ in deployment.bundles),
        pictures=any(bundle.manifest.signature.picture is not None for bundle in bundles),
        texts=any(isinstance(bundle.manifest.text, Text) for bundle in bundles),
        grpc=deployment.grpc_port is not None,
    )


def check_context(folder: Path, *, force: bool = False) -> None:
    """Raise unless a context may be written to the folder: nothing is there, or with `force` another context.

    Raises:
        StorageError: if anything else is there.
    """
    check_own(folder, _NAMES, _is_context)
    if _is_context(folder) and not force:
        raise StorageError(
            f"there is an export in {folder} already", "it may be in use", "name another folder, or set --force"
        )


def write_context(folder: Path, deployment: Deployment, *, force: bool = False) -> tuple[str, ...]:
    """Write the context of a container, whole or not at all; returns its requirements.

    Args:
        folder: new, empty, or with `force` one that this function wrote.
        deployment: what is served, and how.
        force: whether an older context is replaced.

    Raises:
        StorageError: if there is anything else in the folder, or it cannot be written.
        EngineError: if a package that a server needs is not installed here.
    """
    check_context(folder, force=force)
    pinned = packages_of(deployment)
    with building(folder, _NAMES, _is_context) as building_in, explained(f"write {folder}"):
        (building_in / _WHEELS).mkdir()
        write_wheel(building_in / _WHEELS)
        write_run(building_in / _RUN, deployment)
        (building_in / _REQUIREMENTS).write_text("".join(f"{line}\n" for line in pinned))
        (building_in / _INSTALL).write_text(_install(pinned))
        (building_in / _DOCKERFILE).write_text(_dockerfile(deployment))
        files = sorted(file.relative_to(building_in).as_posix() for file in building_in.rglob("*") if file.is_file())
        facts = {**deployment.facts, "name": deployment.name, "image": deployment.image, "cpus": deployment.cpus}
        facts |= {"memory-mib": deployment.memory_mib, "port": deployment.port, "grpc-port": deployment.grpc_port}
        export = {"made_by": "rushhour", "deployment": facts, "requirements": pinned, "files": [*files, _EXPORT]}
        (building_in / _EXPORT).write_bytes(msgspec.json.format(msgspec.json.encode(export), indent=2) + b"\n")
        for path in building_in.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # the container's user is another one
    return pinned


def _is_context(folder: Path) -> bool:
    """Whether a folder is a context, and has no file that `write_context` did not write."""
    try:
        export = msgspec.json.decode((folder / _EXPORT).read_bytes(), type=dict[str, Any])
        listed = set(export["files"]) if export["made_by"] == "rushhour" else set()
        there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}
    except (OSError, msgspec.DecodeError, RecursionError, KeyError, TypeError):
        return False
    return bool(listed) and there <= listed


def serve_command(deployment: Deployment) -> list[str]:
    """The command that serves in the container; an orchestrator appends options."""
    grpc = "--no-grpc" if deployment.grpc_port is None else f"--grpc-port={deployment.grpc_port}"
    listen = ["--host=0.0.0.0", "--expose", f"--http-port={deployment.port}", grpc]
    return ["python", "-m", "rushhour", "serve", f"{_ROOT}/{_RUN}", *listen, "--no-admin"]


def _install(pinned: Sequence[str]) -> str:
    packages = [line.partition("==")[0] for line in pinned]
    unused = [pattern for package in packages for pattern in _UNUSED.get(package, ())]
    return "\n".join(
        [
            "#!/bin/sh",
            "# Made by `rushhour export`: installs Rushhour, and what it imports to serve this Plan, into $1.",
            "set -eu",
            'from=$(cd "$(dirname "$0")" && pwd)',
            "python -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile --no-deps \\",
            f'    --target "$1" --requirement "$from/{_REQUIREMENTS}" "$from/{_WHEELS}"/*.whl',
            'cd "$1"',
            "# What no server on CPUs opens: other devices, other formats, tests, tools.",
            *(f"rm -rf {pattern}" for pattern in ["bin", *unused]),
            "# Symbols for debuggers: most of uvloop.",
            "if command -v strip > /dev/null; then strip --strip-debug uvloop/*.so; fi",
            "# Compiled here: the container's file system is read-only.",
            "python -m compileall -q .",
            "",
        ]
    )


def _dockerfile(deployment: Deployment) -> str:
    base = f"python:{sys.version_info.major}.{sys.version_info.minor}"
    ports = [deployment.port, *([deployment.grpc_port] if deployment.grpc_port is not None else [])]
    environment = {
        "PYTHONPATH": f"{_ROOT}/packages",
        "PYTHONSAFEPATH": 1,
        "PYTHONDONTWRITEBYTECODE": 1,
        "OPENBLAS_NUM_THREADS": 1,
    }
    return "\n".join(
        [
            f"# Made by `rushhour export`: {deployment.model}, served as run/{PLAN} says.",
            f"# Needs {deployment.cpus} CPUs and {deployment.memory_mib} MiB. /tmp is the only place it may write to.",
            "",
            f"FROM {base} AS build",
            f"COPY {_REQUIREMENTS} {_INSTALL} /build/",
            f"COPY {_WHEELS} /build/{_WHEELS}",
            f"RUN sh /build/{_INSTALL} {_ROOT}/packages",
            "",
            f"FROM {base}-slim",
            f"COPY --from=build {_ROOT}/packages {_ROOT}/packages",
            f"COPY {_RUN} {_ROOT}/{_RUN}",
            *(f"ENV {name}={value}" for name, value in environment.items()),
            f"USER {USER}",
            f"EXPOSE {' '.join(map(str, ports))}",
            "STOPSIGNAL SIGTERM",
            "HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \\",
            f"    CMD {json.dumps(['python', '-I', '-S', '-c', _HEALTH.format(port=deployment.port)])}",
            f"ENTRYPOINT {json.dumps(serve_command(deployment))}",
            "",
        ]
    )
