"""The canary: a process that sleeps 5 ms at a time and measures how much longer the machine lets it sleep.

A process of its own, started by the generator, because a thread would wait for the generator's interpreter lock and
report that as noise. It uses the standard library alone and starts in a few milliseconds.

A sleep that is 200 ms too long hides 40 others that would have been too long as well; they are counted with it, so
that the 99th percentile is over time, not over sleeps (as HdrHistogram corrects for coordinated omission). It is the
same for any length of sleep; shorter ones see more of a short window, and cost more: a wake-up takes 15 to 25 µs of
CPU, which counts as the generator's.
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
    """The canary process. It measures between `start` and `stop`; `stop` does not wait, `result` does.

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
        """Begin to measure."""
        self._signal()

    def stop(self) -> None:
        """End the measurement."""
        self._signal()

    def result(self) -> tuple[float, float, float]:
        """The result for the time between `start` and `stop`.

        Returns:
            The 99th percentile of the oversleep, in seconds; the canary's own CPU seconds; the share of the time that
            the hypervisor stole, or in which all tasks waited for memory or disk.
        """
        assert self._process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            part = self._process.stdout.read(256)
            if not part:  # it was killed: without it no window may pass, so the whole time counts as noise
                return 3600.0, 0.0, 0.0
            line += part
        overshoot, cpu, steal = map(float, line.split())
        return overshoot, cpu, steal

    def _signal(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b".")


def _measure() -> None:
    while os.read(0, 1):
        overshoots = []
        began, cpu, stolen, total = time.monotonic(), time.process_time(), *_cpu_times()
        stalled = _stalled_s()
        while True:
            before = time.perf_counter()
            stopped, _, _ = select.select([0], [], [], _SLEEP_S)
            if stopped:
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
    """The machine's stolen and total CPU time since boot, in ticks of the kernel; zeros where it is not known."""
    try:
        with open("/proc/stat", "rb") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        return fields[7], sum(fields)
    except (OSError, ValueError, IndexError):
        return 0, 0


def _stalled_s() -> tuple[float, float]:
    """Seconds since boot in which all tasks waited for memory, and for disk (PSI); zeros without PSI.

    Waiting for a CPU is left out: a busy server causes it itself, and the sleeps measure it.
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
    _measure()
