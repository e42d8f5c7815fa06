"""This machine: cores under affinity and quota, vector extensions, memory and versions."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Annotated, Literal

import msgspec

_VERSIONS = ("rushhour", "numpy", "openvino", "onnxruntime", "torch", "nncf", "onnx", "uvloop", "httptools")

InstructionSet = Literal["amx", "vnni", "avx2", "other"]
"""The class of a processor, by how it multiplies 8-bit integers.

`amx` and `vnni` add up in 32 bits. `avx2` (and AVX-512 without VNNI) adds pairs of products in 16 bits, which saturate
where weights use all 8 bits. `other` is everything else, such as Arm.
"""

_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "sve",
)
_AVX512 = {"avx512f", "avx512_vnni", "avx512_bf16"}
_AMX = {"amx_bf16", "amx_int8"}
_MAX_ISA = "ONEDNN_MAX_CPU_ISA"
_HIDDEN = {
    "SSE41": {"avx2", "avx_vnni", *_AVX512, *_AMX},
    "AVX": {"avx2", "avx_vnni", *_AVX512, *_AMX},
    "AVX2": {"avx_vnni", *_AVX512, *_AMX},
    "AVX2_VNNI": {*_AVX512, *_AMX},
    "AVX2_VNNI_2": {*_AVX512, *_AMX},
    "AVX512_CORE": {"avx_vnni", "avx512_vnni", "avx512_bf16", *_AMX},
    "AVX512_CORE_VNNI": {"avx512_bf16", *_AMX},
    "AVX512_CORE_BF16": _AMX,
    "AVX512_CORE_FP16": _AMX,
}
"""Vector extensions that oneDNN's variable hides from OpenVINO and torch; they then do not count."""


class Machine(msgspec.Struct, frozen=True):
    """The machine and the software of a measurement.

    Attributes:
        cpu: the processor's name.
        cores: that this process may use (affinity and cgroup quota, not the host's count).
        features: the vector extensions that decide precision: avx512_vnni, avx512_bf16, amx_int8, ...; without those
            that ONEDNN_MAX_CPU_ISA hides.
        memory_gb: total memory, in GiB.
        versions: package -> version.
    """

    cpu: str
    cores: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    features: tuple[str, ...]
    memory_gb: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    system: str
    python: str
    versions: dict[str, str]

    @property
    def isa(self) -> InstructionSet:
        """The class of the processor."""
        if "amx_int8" in self.features:
            return "amx"
        if not {"avx512_vnni", "avx_vnni"}.isdisjoint(self.features):
            return "vnni"
        return "avx2" if "avx2" in self.features else "other"

    @property
    def has_bf16(self) -> bool:
        """Whether it has instructions for bfloat16."""
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(self.features)

    @property
    def saturates(self) -> bool:
        """Whether int8 with weights of the full 8 bits may saturate, and give wrong outputs."""
        return self.isa == "avx2"

    def __str__(self) -> str:
        return f"{self.cpu} ({self.isa}), {self.cores} cores, {self.memory_gb:g} GiB"

    def report(self) -> str:
        """One line for the report of an error."""
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        features = " ".join(self.features) or "none known"
        return f"{self}; vector extensions: {features}; {self.system}, Python {self.python}; {versions}"


def cores() -> int:
    """Cores this process may use: the smaller of its CPU affinity and its cgroup CPU quota, at least 1."""
    allowed, quota = limits()
    return max(1, min(allowed, int(quota)) if quota is not None else allowed)


def limits() -> tuple[int, float | None]:
    """Cores in this process's CPU affinity, and CPUs of its cgroup quota; None without a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return allowed, _cgroup_quota(Path("/sys/fs/cgroup"))


def _cgroup_quota(root: Path, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPU quota of this process's cgroups (v2 `cpu.max`, v1 `cpu.cfs_quota_us`); None without one.

    A quota limits all cgroups below it, so the smallest on the path to the root counts.
    """
    try:
        below = next(line.partition("::")[2].strip("/") for line in own.read_text().splitlines() if "::" in line)
    except (OSError, StopIteration):
        below = ""
    # In a container the path may name a cgroup of the host, which is not visible here: the root is then ours.
    folders = [root / below, *(root / below).parents] if below and ".." not in below else [root]
    granted = [quota for folder in folders if (quota := _quota_of(folder)) is not None and folder.is_relative_to(root)]
    return min(granted, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = (folder / "cpu/cpu.cfs_quota_us").read_text().strip()
        period = (folder / "cpu/cpu.cfs_period_us").read_text().strip()
        return None if int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def open_files(wanted: int) -> tuple[int, int]:
    """Raise the limit on this process's open files to `wanted`, or to the hard limit.

    Returns:
        The new limit (`wanted` where there is none), and the number of open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        used = 16 if soft < 1024 else 64
    return (wanted if soft == resource.RLIM_INFINITY else soft), used


@functools.cache
def describe() -> Machine:
    """The machine of this process. Reads only files and package metadata; imports nothing heavy."""
    cpu, flags = platform.machine(), set[str]()
    memory_kb = 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                cpu = value.strip()
            elif name.strip() == "flags":
                flags = set(value.split())
                break
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                memory_kb = int(line.split()[1])
    except OSError:
        pass
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    flags -= _HIDDEN.get(os.environ.get(_MAX_ISA, "").upper(), set())
    return Machine(
        cpu=cpu,
        cores=cores(),
        features=tuple(feature for feature in _FEATURES if feature in flags),
        memory_gb=round(memory_kb / 2**20, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=versions,
    )
