"""Triton from the nvidia-pytriton wheel: lays out a model repository, then becomes tritonserver."""

from __future__ import annotations

import os
import shutil
import string
import sys
import sysconfig
from pathlib import Path

from bench_model import INSTANCES, MAX_BATCH, PORT

_HERE = Path(__file__).resolve().parent
_PACKAGES = Path(sysconfig.get_path("purelib"))
_SERVER = _PACKAGES / "pytriton" / "tritonserver"


def main() -> None:
    """Never returns."""
    work = Path(os.environ["BENCH_WORK"])
    name = "noop" if os.environ["BENCH_MODEL"] == "noop" else "cnn"
    _lay_out(work / "repository" / name, name)
    binary = _SERVER / "bin" / "tritonserver"
    binary.chmod(0o755)
    libraries = (str(_PACKAGES / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"))
    os.environ["LD_LIBRARY_PATH"] = ":".join(libraries)
    os.environ["BENCH_PACKAGES"] = str(_PACKAGES)
    os.execv(
        binary,
        [
            str(binary),
            f"--model-repository={work / 'repository'}",
            f"--backend-directory={_backends(work)}",
            "--http-address=127.0.0.1",
            f"--http-port={PORT}",
            f"--http-thread-count={os.environ.get('BENCH_TRITON_THREADS', 2 * INSTANCES)}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            "--disable-auto-complete-config",
            "--backend-config=python,shm-default-byte-size=16777216",
            f"--backend-config=python,shm-region-prefix-name={work.name}",
            "--log-info=false",
        ],
    )


def _lay_out(folder: Path, name: str) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(_HERE / "model.py", folder / "1" / "model.py")
    config = string.Template((_HERE / "config.pbtxt").read_text())
    text = config.substitute(name=name, max_batch=MAX_BATCH, instances=INSTANCES)
    (folder / "config.pbtxt").write_text(text)


def _backends(work: Path) -> Path:
    """The python backend with the stub of this Python's version beside it, both with their run bit."""
    backends = work / "backends"
    if not backends.exists():
        shutil.copytree(_SERVER / "backends", backends)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = _SERVER / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, backends / "python")
        for file in (backends / "python").iterdir():
            if file.is_file():
                file.chmod(0o755)
    return backends


if __name__ == "__main__":
    main()
