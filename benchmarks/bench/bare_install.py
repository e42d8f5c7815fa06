"""`pip install rushhour` and nothing else: its size, how long it takes to import, and until a bundle is served."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from bench.environments import CannotInstall
from bench.models import bundle_of
from bench.parts import Part, say
from bench.record import Table, verdict
from bench.servers import free_port

_SOURCE = Path(__file__).resolve().parents[2]
_LONGEST_S = 60.0
_ENGINES = "openvino", "onnxruntime"
_HEAVY = "torch", "nncf", "matplotlib", "onnx"
_IMPORT = (
    "import sys, time; began = time.perf_counter(); import rushhour; seconds = time.perf_counter() - began; "
    f"print(seconds, *sorted(set(sys.modules) & {set(_HEAVY)}))"
)
_HIDE = "import sys; sys.modules['{}'] = None\nfrom rushhour.__main__ import main; main()"
"""Runs the command line as if a package were not installed."""


class Bare:
    """An environment of Python's `venv` with Rushhour's base install alone.

    Raises:
        CannotInstall: if pip fails.
    """

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.python, self.bundle = folder / "bin" / "python", bundle
        _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
        self.packages = next((folder / "lib").glob("python*/site-packages"))
        target = ["--quiet", "--target", str(self.packages), "--disable-pip-version-check"]
        _run([sys.executable, "-m", "pip", "install", *target, str(_SOURCE)])

    def sizes(self) -> dict[str, float]:
        """MB of the files of each package, largest first; what is below 1 MB, and metadata, together as `others`."""
        found: dict[str, int] = {}
        for file in self.packages.rglob("*"):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(self.packages).parts[0].removesuffix(".libs")
                found[name] = found.get(name, 0) + file.stat().st_size
        shown = {name: size / 1e6 for name, size in found.items() if size >= 1e6}
        return dict(sorted(shown.items(), key=lambda item: -item[1])) | {
            "others": sum(size for size in found.values() if size < 1e6) / 1e6
        }

    def import_s(self) -> tuple[float, list[str]]:
        """Seconds of `import rushhour`, and the heavy packages that it loads."""
        said = self._said(["-c", _IMPORT]).stdout.split()
        return float(said[0]), said[1:]

    def start_s(self, without: str = "") -> float:
        """Seconds from the start of `rushhour serve BUNDLE` until its readiness endpoint says so.

        Args:
            without: an engine that is hidden, as if it were not installed.
        """
        port = free_port()
        words = ["serve", str(self.bundle), f"--http-port={port}", "--no-grpc"]
        how = ["-c", _HIDE.format(without)] if without else ["-m", "rushhour"]
        began = time.monotonic()
        process = subprocess.Popen(
            [str(self.python), *how, *words], env=_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while process.poll() is None and time.monotonic() < began + _LONGEST_S:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
                    return time.monotonic() - began
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        raise CannotInstall("`rushhour serve` of a bare install does not get ready")

    def refusal(self) -> str:
        """What `rushhour serve` says where neither engine is installed."""
        code = "import sys\n" + "".join(f"sys.modules['{engine}'] = None\n" for engine in _ENGINES)
        done = self._said(["-c", code + "from rushhour.__main__ import main; main()", "serve", str(self.bundle)])
        return done.stderr.strip().splitlines()[-1] if done.returncode == 2 and done.stderr.strip() else ""

    def _said(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), *words],
            env=_ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            check=False,
        )


def bare_install(starts_each: int, work: Path, bench: Path) -> Part:
    """Part 5: size, import and start of the base install."""
    bare = Bare(work, bundle_of("cnn", bench / "models").path)
    sizes = bare.sizes()
    imports = [bare.import_s() for _ in range(starts_each)]
    heavy = sorted({name for _, names in imports for name in names})
    starts = {
        engine: [bare.start_s(other) for _ in range(starts_each + 1)][1:]  # the first reads files from the disk
        for engine, other in zip(_ENGINES, reversed(_ENGINES), strict=True)
    }
    starts["both installed"] = [bare.start_s() for _ in range(starts_each)]
    refusal = bare.refusal()
    say(f"base install: {sum(sizes.values()):.0f} MB, import {statistics.median(s for s, _ in imports):.2f} s")
    checks = [
        verdict("5.size", "files of the base install, both engines included", "<= 500", sum(sizes.values()), None, 1,
                unit="MB"),
        verdict("5.import", "`import rushhour`, median", "< 0.3", statistics.median(s for s, _ in imports), None,
                len(imports), unit="s"),
        verdict("5.heavy", f"of {', '.join(_HEAVY)}: installed, or loaded by the import", "<= 0",
                len(heavy) + sum((bare.packages / name).exists() for name in _HEAVY), None, 1, unit="packages"),
        *(
            verdict(f"5.ready.{name.split()[0]}", f"`rushhour serve` of a bundle until it is ready, {name}, median",
                    "< 1.5", statistics.median(seconds), None, len(seconds), unit="s")
            for name, seconds in starts.items()
        ),
        verdict("5.none", "neither engine installed: refused in one line that names the remedy", ">= 1",
                int("pip install" in refusal), None, 1, why=refusal),
    ]  # fmt: skip
    rows = tuple((name, size) for name, size in sizes.items())
    begun = tuple((name, statistics.median(seconds), min(seconds), max(seconds)) for name, seconds in starts.items())
    tables = (
        Table("Size of the base install", ("package", "MB"), rows),
        Table("From `rushhour serve BUNDLE` to ready, in seconds", ("engine", "median", "least", "most"), begun),
    )
    return Part(tuple(checks), tables, {"starts": starts, "imports": [s for s, _ in imports], "refusal": refusal})


_ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotInstall((done.stderr.strip().splitlines() or ["pip printed no message"])[-1][:300])
