"""`make fuzz`: all targets side by side for FUZZ_SECONDS (600), guided by coverage; `benchmarks/results/fuzz.json`.

Inputs with new coverage are kept, minimised, in `fuzz/corpus`; the test suite replays them. An input that violates
an invariant is left in `.bench/fuzz` for `python fuzz/run.py TARGET FILE`.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris
import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

_FOUND = ROOT / ".bench" / "fuzz"
_LARGEST = {"wire": 600, "grpc": 600, "http": 4400}
_KEPT_BYTES = 48 * 1024
"""Of each target's corpus."""
_WORDS = Path(__file__).with_name("words.dict")
_INSTRUMENTED = ["rushhour.wire", "rushhour.serve", "rushhour.errors"]


def attack(target: str, arguments: list[str]) -> None:
    """Run libFuzzer in this process, with its own arguments."""
    with atheris.instrument_imports(include=_INSTRUMENTED):
        import targets
    # To merge, libFuzzer restarts itself by its first argument, through a shell.
    itself = shlex.join([sys.executable, __file__, target])
    atheris.Setup([itself, *arguments], targets.TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """Fuzz, keep new inputs, write the record; 1 if an invariant was violated."""
    from bench.record import Table, record, verdict
    from targets import CORPUS, TARGETS

    seconds, seed = int(os.environ.get("FUZZ_SECONDS", "600")), random.SystemRandom().randrange(1, 2**31)
    _FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        running = {target: _start(target, Path(folder) / target, CORPUS / target, seconds, seed) for target in TARGETS}
        crashed = {target: int(process.wait() != 0) for target, process in running.items()}
        logs = {target: _log(Path(folder) / target).read_text(errors="replace") for target in TARGETS}
        for target in TARGETS:
            _keep(target, Path(folder) / target, CORPUS / target)
    rows, checks = [], []
    for target in TARGETS:
        executions = _figure(r"stat::number_of_executed_units: (\d+)", logs[target])
        ran = _figure(r"in (\d+) second", logs[target])
        kept = list((CORPUS / target).iterdir())
        rows.append(
            (
                target,
                ran,
                executions,
                _figure(r"cov: (\d+)", logs[target]),
                _figure(r"ft: (\d+)", logs[target]),
                _figure(r"stat::peak_rss_mb: +(\d+)", logs[target]),
                len(kept),
                sum(file.stat().st_size for file in kept) / 1024,
                crashed[target],
            )
        )
        what = f"`{target}`: inputs that violate an invariant, of {executions:,}"
        lines = logs[target].strip().splitlines()
        why = "" if not crashed[target] else f"{lines[-1] if lines else 'no message'}"
        checks += [
            verdict(f"7.{target}.crashes", what, "<= 0", crashed[target], None, executions, unit="inputs", why=why),
            verdict(f"7.{target}.time", f"`{target}`: time fuzzed", ">= 600", ran, None, 1, unit="s"),
        ]
    columns = ("target", "s", "executions", "edges", "features", "peak RSS, MiB", "corpus", "corpus, KiB", "crashes")
    note = "All at once, coverage-guided (atheris, libFuzzer); edges are of Python code."
    tables = [msgspec.to_builtins(Table("fuzzing", columns, tuple(rows), note))]
    versions = {"atheris": importlib.metadata.version("atheris"), "httptools": importlib.metadata.version("httptools")}
    done = record(checks, {"tables": tables}, {"libFuzzer": seed}, versions)
    whole = seconds >= 600
    done.save((ROOT / "benchmarks" / "results" if whole else _FOUND) / "fuzz.json")
    for row in rows:
        print(dict(zip(columns, row, strict=True)))
    for target in TARGETS:
        if crashed[target]:
            print(logs[target][-4000:], file=sys.stderr)
    return max(crashed.values())


def _log(found: Path) -> Path:
    """Of a target: a file, since a pipe that nobody reads stops its writer once it is full."""
    return found.with_suffix(".log")


def _start(target: str, found: Path, corpus: Path, seconds: int, seed: int) -> subprocess.Popen[bytes]:
    found.mkdir()
    arguments = [
        str(found),
        str(corpus),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={_LARGEST[target]}",
        f"-dict={_WORDS}",
        f"-artifact_prefix={_FOUND / target}-",
        "-print_final_stats=1",
        "-rss_limit_mb=1024",
        "-timeout=30",
    ]
    with _log(found).open("wb") as log:
        return subprocess.Popen([sys.executable, __file__, target, *arguments], stderr=log)


def _keep(target: str, found: Path, corpus: Path) -> None:
    """Reduce the corpus to the fewest and smallest inputs with the same coverage."""
    with tempfile.TemporaryDirectory() as folder:
        merge = [sys.executable, __file__, target, "-merge=1", f"-max_len={_LARGEST[target]}", folder]
        subprocess.run([*merge, str(corpus), str(found)], check=True, capture_output=True)
        shutil.rmtree(corpus)
        corpus.mkdir()
        total = 0
        for file in sorted(Path(folder).iterdir(), key=lambda file: (file.stat().st_size, file.name)):
            total += file.stat().st_size
            if total <= _KEPT_BYTES:
                shutil.copyfile(file, corpus / file.name[:16])


def _figure(pattern: str, log: str) -> int:
    """The last number of its kind in the log of libFuzzer."""
    return int((re.findall(pattern, log) or ["0"])[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        attack(sys.argv[1], sys.argv[2:])
    sys.exit(main())
