"""Disturbances of a host, made on purpose, to run any command under them.

    python -m rushhour.testing.disturbers --bursts 0.08 --waves two-state --seed 1 -- rushhour demo

`Bursts` are processes that use every core for short times. `--waves` names a curve of the host's speed, which varies
over seconds: every batch of every engine takes longer while the host is slow, in the command and in all Python
processes that it starts, at the same times and by the same factor.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour import engines
from rushhour.bundle import Bundle, Signature, Sizes
from rushhour.clock import Clock, WallClock
from rushhour.engines import Done, Engine, EngineConfig, Slot
from rushhour.testing.host_speed import STEP_S, Recorded, SpeedCurve, Steady, TwoState

CURVES: Mapping[str, SpeedCurve] = {
    "two-state": TwoState(),
    "recorded": Recorded(),
    "recorded-single": Recorded("one stream of one thread"),
}
VARIABLE = "RUSHHOUR_WAVES"
"""Environment variable: the curve that slows down engines, as JSON."""
_STEPS = 36_000
"""An hour; then the curve repeats."""
_REMEMBERED = 15


class Bursts:
    """A context in which processes use every core of this process in bursts, with priority over everything else on it.

    One process for each core, pinned, under SCHED_FIFO: it preempts whatever runs there, like a busy hypervisor. It
    needs root or CAP_SYS_NICE, and a control group may forbid it; then it takes the highest priority that is allowed,
    and `how` has it. The kernel leaves others 5% of each second (`sched_rt_runtime_us`), so a burst of a whole second
    takes a little longer. The processes end with this one in every case.

    Args:
        share: mean share of each core; 0 for none.
        seed: of the bursts' lengths and pauses.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"0 <= share < 1 must hold, but got share={share}")
        self._share = share
        self._seed = seed
        self._burners: list[subprocess.Popen[str]] = []
        self.how: tuple[str, ...] = ()
        """Descriptions of the priority; more than one where cores differ."""

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, one for each core."""
        return tuple(burner.pid for burner in self._burners)

    def __enter__(self) -> Bursts:
        program = str(importlib.resources.files("rushhour.testing") / "burner.py")
        for core in sorted(os.sched_getaffinity(0)) if self._share else ():
            command = [sys.executable, "-I", "-S", program, str(core), str(self._share), str(self._seed)]
            self._burners.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True))
        lines = [burner.stdout.readline().strip() for burner in self._burners if burner.stdout is not None]
        self.how = tuple(sorted(set(lines)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for burner in self._burners:
            burner.kill()
            burner.wait()
            if burner.stdout is not None:
                burner.stdout.close()
        self._burners.clear()


class HostSpeed:
    """The host's speed now, as a share of its highest: equal in all processes of the machine.

    Args:
        curve: of the speed.
        seed: of the curve.
        clock: by default the machine's own, which all its processes share.
        slower: factor by which it is slower at all times.
    """

    def __init__(self, curve: SpeedCurve, seed: int, clock: Clock | None = None, *, slower: float = 1.0) -> None:
        speeds = curve.speeds(_STEPS, 1, np.random.default_rng(seed))[:, 0]
        self._shares: list[float] = (speeds / (slower * speeds.max())).tolist()
        self._clock = clock or WallClock()

    def now(self) -> float:
        """Above 0, at most 1."""
        return self._shares[int(self._clock.now() / STEP_S) % _STEPS]


class SlowedEngine:
    """An engine on a host of varying speed: unchanged at the highest speed, slower at all other times.

    The extra time of a batch is computed, not slept, because a slow core is busy for longer. Each thread of the stream
    computes, without holding the interpreter lock. The extra time is a share of the shortest of the last batches of the
    same size: the time that a batch waited for a busy core is not the engine's.

    Args:
        engine: to be slowed down; closed with this one.
        speed: of the host.
        busy: keeps one thread busy for a number of seconds.
        timer: of batches, in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        speed: HostSpeed,
        busy: Callable[[float], None] | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        helpers = engine.config.threads - 1
        self._pool = ThreadPoolExecutor(engine.config.streams * helpers) if helpers else None
        on_all = partial(_on_all, busy or compute, self._pool, helpers)
        self._slots = tuple(_Slot(slot, speed, on_all, timer) for slot in engine.slots)

    @property
    def signature(self) -> Signature:
        """As `Engine.signature`."""
        return self._engine.signature

    @property
    def config(self) -> EngineConfig:
        """As `Engine.config`."""
        return self._engine.config

    @property
    def effective(self) -> Mapping[str, str]:
        """As `Engine.effective`."""
        return self._engine.effective

    @property
    def slots(self) -> Sequence[Slot]:
        """As `Engine.slots`."""
        return self._slots

    def spare(self) -> Sequence[Slot]:
        """As `Engine.spare`: none, the engine does not know of the extra time."""
        return ()

    def close(self) -> None:
        """As `Engine.close`."""
        self._engine.close()
        if self._pool is not None:
            self._pool.shutdown()


class _Slot:
    """A slot whose batches end later."""

    def __init__(self, slot: Slot, speed: HostSpeed, busy: Callable[[float], None], timer: Callable[[], float]) -> None:
        self._slot = slot
        self._speed = speed
        self._busy = busy
        self._timer = timer
        self._usual: dict[int, deque[float]] = {}

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        return self._slot.inputs

    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]:
        return self._slot.outputs

    def resize(self, sizes: Sizes) -> None:
        self._slot.resize(sizes)

    def start(self, rows: int, done: Done) -> None:
        began = self._timer()

        def over(error: BaseException | None) -> None:
            durations = self._usual.setdefault(rows, deque(maxlen=_REMEMBERED))
            durations.append(self._timer() - began)
            self._busy(min(durations) * (1 / self._speed.now() - 1))
            done(error)

        self._slot.start(rows, over)


def _on_all(busy: Callable[[float], None], pool: ThreadPoolExecutor | None, helpers: int, seconds: float) -> None:
    if seconds <= 0:
        return
    others = [pool.submit(busy, seconds) for _ in range(helpers)] if pool is not None else []
    busy(seconds)
    for other in others:
        other.result()


@cache
def _rounds_per_s() -> float:
    """Rounds per second of a hash that is computed without the interpreter lock: the best of several attempts."""
    rates = []
    for _ in range(5):
        began = time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)
        rates.append(20_000 / (time.thread_time() - began))
    return max(rates)


def compute(seconds: float) -> None:
    """Keep this thread busy for about `seconds`, without the interpreter lock."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", max(1, round(seconds * _rounds_per_s())))


def slowed_environment(
    curve: str | None, seed: int, base: Mapping[str, str] | None = None, *, slower: float = 1.0
) -> dict[str, str]:
    """Environment variables that slow down the engines of a Python command and of all Python processes it starts.

    Args:
        curve: a name of `CURVES`; None for a constant speed.
        seed: of the curve.
        base: the environment to extend; by default that of this process.
        slower: factor by which every batch takes longer, beside the curve.
    """
    environment = dict(os.environ if base is None else base)
    hook = str(importlib.resources.files("rushhour.testing") / "hook")
    folders = [hook, *filter(None, [environment.get("PYTHONPATH")])]
    settings = json.dumps({"curve": curve, "seed": seed, "slower": slower})
    return {**environment, "PYTHONPATH": os.pathsep.join(folders), VARIABLE: settings}


def slow_all_engines() -> None:
    """Slow down every engine that this process opens from now on, as `VARIABLE` sets it."""
    settings = json.loads(os.environ[VARIABLE])
    curve = CURVES.get(settings["curve"] or "", Steady())
    speed = HostSpeed(curve, settings["seed"], slower=settings["slower"])
    plain = engines._compiled

    def compiled(bundle: Bundle, config: EngineConfig, trusted: tuple[str, ...]) -> Engine:
        return SlowedEngine(plain(bundle, config, trusted), speed)

    engines._compiled = compiled


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in place of this process, disturbed."""
    parser = argparse.ArgumentParser(
        prog="python -m rushhour.testing.disturbers", description="Runs a command on a disturbed host."
    )
    parser.add_argument("--bursts", type=float, default=0.0, metavar="SHARE", help="of each core, used in bursts")
    parser.add_argument("--waves", choices=sorted(CURVES), help="curve of the host's speed, for all engines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args(arguments)
    environment = dict(os.environ) if given.waves is None else slowed_environment(given.waves, given.seed)
    bursts = Bursts(given.bursts, given.seed).__enter__()  # they end with the command, which is this process
    for how in bursts.how:
        print(f"bursts of {given.bursts:.0%} of each core, {how}", file=sys.stderr, flush=True)
    os.execvpe(given.command[0], given.command, environment)


if __name__ == "__main__":
    main()
