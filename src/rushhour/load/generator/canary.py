"""The noise guard: a process that sleeps 5 ms at a time and notices when the machine lets it sleep longer.

A process of its own, started by the generator, because a thread would wait for the generator's interpreter lock and
report that as noise. It holds to the standard library and starts in a few milliseconds.

A sleep that is 200 ms too long hides 40 others that would have been too long as well; they are counted with it, so
that the 99th percentile is one over time, not one over sleeps. It is the same for any length of sleep; shorter ones see
more of a short window, and cost more: to be woken takes 15 to 25 µs of CPU, which counts as the generator's.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from types import TracebackType

_SLEEP_S = 0.005


class Canary:
    """Owner of the canary process. Between `start` and `stop` it watches; `stop` does not wait, `result` does.

    The process ends when this object is closed or its owner dies.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def __enter__(self) -> Canary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self) -> None:
        """Begin to watch."""
        self._say()

    def stop(self) -> None:
        """Watch no more."""
        self._say()

    def result(self) -> tuple[float, float, float]:
        """Of the time between `start` and `stop`.

        Returns:
            The 99th percentile of what was slept too long, in seconds; the canary's own CPU seconds; the share of
            the time that was taken from the machine: by its hypervisor, or by waiting for memory or disk.
        """
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            part = self._process.stdout.read(256)
            if not part:  # killed by someone: without a guard nothing may pass, so the whole time counts as noise
                return 3600.0, 0.0, 0.0
            line += part
        overshoot, cpu, steal = map(float, line.split())
        return overshoot, cpu, steal

    def _say(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b".")


def _watch() -> None:
    while os.read(0, 1):
        overshoots = []
        began, cpu, stolen, total = time.monotonic(), time.process_time(), *_cpu_times()
        stalled = _stalled_s()
        while True:
            before = time.perf_counter()
            asked, _, _ = select.select([0], [], [], _SLEEP_S)
            if asked:
                break
            overshoot = time.perf_counter() - before - _SLEEP_S
            overshoots.append(overshoot)
            while overshoot > _SLEEP_S:
                overshoot -= _SLEEP_S
                overshoots.append(overshoot)
        if not os.read(0, 1):
            break
        overshoots.sort()
        p99 = overshoots[int(0.99 * (len(overshoots) - 1))] if overshoots else 0.0
        stolen_now, total_now = _cpu_times()
        steal = (stolen_now - stolen) / max(1, total_now - total)
        lasted = max(1e-9, time.monotonic() - began)
        steal = max(steal, *((now - then) / lasted for now, then in zip(_stalled_s(), stalled, strict=True)))
        os.write(1, f"{p99} {time.process_time() - cpu} {steal}\n".encode())


def _cpu_times() -> tuple[int, int]:
    """The machine's stolen and total CPU time since its start, in ticks of the kernel; zeros where it does not say."""
    try:
        with open("/proc/stat", "rb") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return fields[7], sum(fields)
    except (OSError, ValueError, IndexError):
        return 0, 0


def _stalled_s() -> tuple[float, float]:
    """Seconds since the start in which every task waited for memory, and for disk (PSI); zeros without PSI.

    Waiting for a CPU is left out: a server that is busy causes it itself, and the sleeps feel it.
    """
    memory, disk = (_full_s(f"/proc/pressure/{resource}") for resource in ("memory", "io"))
    return memory, disk


def _full_s(path: str) -> float:
    try:
        with open(path) as file:
            full = next(line for line in file if line.startswith("full"))
        return int(full.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError, StopIteration):
        return 0.0


if __name__ == "__main__":
    _watch()
