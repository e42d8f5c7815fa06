"""A restricted processor: runs a command as if this machine had AVX2 and nothing newer.

    python -m rushhour.testing.processor pytest tests/engines/test_engines.py

Environment variables are not enough: torch reads ATEN_CPU_CAPABILITY, oneDNN (in torch and in OpenVINO)
ONEDNN_MAX_CPU_ISA, but OpenVINO's own kernels and those of ONNX Runtime query the processor directly. So their `cpuid`
instructions are located, and answered by an auditor of the dynamic linker (cpuid.c, compiled here). docs/machines.md
has a table of what each variable affects.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rushhour.errors import EngineError
from rushhour.system.machine import describe
from rushhour.system.storage import write_whole

VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Variables that libraries read themselves."""
_PACKAGES = ("onnxruntime", "openvino", "torch", "numpy", "scipy")
_CPUID = b"\x0f\xa2"
_NEAR = range(24, 120)
"""Bytes before a candidate at which decoding starts: decoding synchronises within a few instructions."""
_MOST = 0.3
"""This share of the starts must decode it as an instruction. On three libraries, against a full disassembly: above 0.45
for all true ones, 0 for all others."""


def restricted(base: dict[str, str] | None = None) -> dict[str, str]:
    """Environment variables under which a command and its child processes see no instruction set above AVX2.

    On a processor that has AVX2 and nothing newer they are those of `base`.

    Args:
        base: the environment to extend; by default that of this process.

    Raises:
        EngineError: if that is not possible: it needs x86-64 Linux, a C compiler and the package capstone, and a
            processor with AVX2.
    """
    environment = dict(os.environ if base is None else base)
    features = set(describe().features)
    if features == {"avx2"}:
        return environment
    if not features:
        raise EngineError(
            "there is no instruction set to hide", "this processor has less than AVX2", "run the command directly"
        )
    auditor, sites = _auditor(), _sites()
    return {**environment, **VARIABLES, "LD_AUDIT": str(auditor), "RUSHHOUR_CPUID_SITES": str(sites)}


@cache
def _auditor() -> Path:
    """The compiled auditor."""
    compiler = shutil.which("cc")
    if platform.machine() != "x86_64" or platform.system() != "Linux" or compiler is None:
        raise EngineError(
            "cannot hide instruction sets here",
            "the auditor needs x86-64 Linux and a C compiler",
            "install gcc, or set " + " ".join(f"{name}={value}" for name, value in VARIABLES.items()),
        )
    source = importlib.resources.files("rushhour.testing").joinpath("cpuid.c").read_bytes()
    target = _cached(f"cpuid-{_digest(source)}.so")
    if not target.is_file():
        building = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-o", str(building), "-"]
        ended = subprocess.run(command, input=source, capture_output=True, check=False)
        if ended.returncode:
            raise EngineError(
                "cannot compile the auditor", ended.stderr.decode(errors="replace").strip(), "install gcc and libc6-dev"
            )
        building.replace(target)
    return target


@cache
def _sites() -> Path:
    """A file with the addresses of all `cpuid` instructions in the libraries of engines."""
    libraries = sorted(_libraries())
    known = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in libraries]
    target = _cached(f"sites-{_digest(chr(10).join(known).encode())}")
    if not target.is_file():
        write_whole(target, "".join(f"{path} {at:x}\n" for path in libraries for at in _instructions(path)).encode())
    return target


def _libraries() -> Iterator[Path]:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in () if spec is None else spec.submodule_search_locations or ():
            for place in (Path(folder), Path(f"{folder}.libs")):
                yield from (path.resolve() for path in place.rglob("*.so*") if path.is_file())


def _instructions(path: Path) -> Iterator[int]:
    """Virtual addresses, as in the file, of its `cpuid` instructions."""
    try:
        import capstone
    except ImportError as error:
        raise EngineError(
            "cannot find the instructions to replace", str(error), "install it with `pip install 'rushhour[dev]'`"
        ) from error
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    content = path.read_bytes()
    if content[:4] != b"\x7fELF":
        return
    (table,), (size, count) = struct.unpack_from("<Q", content, 32), struct.unpack_from("<HH", content, 54)
    for index in range(count):
        kind, flags, begin, address, _, length = struct.unpack_from("<IIQQQQ", content, table + index * size)
        if kind != 1 or not flags & 1:  # neither loaded nor executable
            continue
        at = content.find(_CPUID, begin, begin + length)
        while at != -1:
            met = sum(_meets(decoder, content[at - back : at + 2], back) for back in _NEAR)
            if met > _MOST * len(_NEAR):
                yield address + at - begin
            at = content.find(_CPUID, at + 1, begin + length)


def _meets(decoder: Any, code: bytes, distance: int) -> bool:
    """Whether decoding `code` from its start finds a `cpuid` at its end."""
    return any(at == distance and name == "cpuid" for at, _, name, _ in decoder.disasm_lite(code, 0))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _cached(name: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rushhour"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m rushhour.testing.processor COMMAND [ARGUMENT ...]")
    try:
        environment = restricted()
    except EngineError as error:
        sys.exit(f"rushhour: {error}")
    os.execvpe(sys.argv[1], sys.argv[1:], environment)
