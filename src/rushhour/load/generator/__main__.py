"""The generator as a process: `python -m rushhour.load.generator SOCKET LIFELINE [CORE ...]`; the first two are file
descriptors.

It takes jobs from the socket. The lifeline is a pipe: it closes when the parent ends, which is noticed during a run
too; a byte on it ends that run early. (The socket cannot serve for this: the event loop would make it non-blocking.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

import msgspec
import uvloop

from rushhour.errors import LoadError
from rushhour.load.generator.canary import Canary
from rushhour.load.generator.client import run
from rushhour.load.generator.job import MAX_CONNECTIONS, ClosedJob, OpenJob, Refusal, Tick, pack, receive, send
from rushhour.load.generator.samples import Samples
from rushhour.system.machine import open_files

_SPARE_FILES = 16
_FEWEST_CONNECTIONS = 8


def _serve(channel: socket.socket, lifeline: int, cores: set[int]) -> None:
    with Canary() as canary, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop()  # which opens files
        files, used = open_files(MAX_CONNECTIONS + 4 * _SPARE_FILES)
        if cores:  # after the canary has started, which must run on the server's cores too
            os.sched_setaffinity(0, cores)
        _set_timer_slack()
        while (frame := receive(channel)) is not None:
            job = msgspec.msgpack.decode(frame[1], type=OpenJob | ClosedJob)
            _set_priority(on_time=isinstance(job, OpenJob))
            bound = min(job.max_connections, files - used - _SPARE_FILES)
            try:
                fewest = job.concurrency if isinstance(job, ClosedJob) else _FEWEST_CONNECTIONS
                if bound < min(job.max_connections, fewest):
                    raise LoadError(
                        f"the load generator may open only {files} files",
                        f"it needs {used + _SPARE_FILES + fewest} for {fewest} connections",
                        "raise the limit: ulimit -n 4096",
                    )
                job = msgspec.structs.replace(job, max_connections=bound)
                result = runner.run(_run(job, canary, channel, lifeline))
            except LoadError as error:
                refusal = Refusal(what=error.what, why=error.why, fix=error.fix)
                send(channel, b"e", msgspec.msgpack.encode(refusal))
            else:
                send(channel, b"r", pack(result))


async def _run(job: OpenJob | ClosedJob, canary: Canary, channel: socket.socket, lifeline: int) -> Samples:
    """Run a job until it is done, or the parent stops it. If the parent has ended, this process ends."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_lifeline() -> None:
        if not os.read(lifeline, 1):
            os._exit(0)
        stop.set()

    loop.add_reader(lifeline, on_lifeline)
    try:
        return await run(job, canary, lambda tick: _report(channel, tick), stop)
    finally:
        loop.remove_reader(lifeline)


def _report(channel: socket.socket, tick: Tick) -> None:
    with contextlib.suppress(OSError):  # the lifeline shows when the parent has ended
        send(channel, b"t", msgspec.msgpack.encode(tick))


def _set_timer_slack() -> None:
    """Have sleeps end within 1 µs; the kernel's default is 50 µs, 5% of a limit of 1 ms."""
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1000")


def _set_priority(*, on_time: bool) -> None:
    """Preempt other processes on this core, where that is allowed (root, CAP_SYS_NICE): a generator on a machine of its
    own would not compete with the server.

    Otherwise a server that keeps all cores busy delays the sending of requests by a tick of the kernel: 3 ms at the
    99th percentile, whatever the generator's nice value or slice. The generator uses 70% of a core at most, or the
    window is not valid; a closed loop has no schedule to keep.
    """
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK if on_time else os.SCHED_OTHER
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(1 if on_time else 0))


def main() -> None:
    """Take jobs until the parent closes the socket or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which ends this process
    with socket.socket(fileno=int(sys.argv[1])) as channel, contextlib.suppress(BrokenPipeError):
        _serve(channel, int(sys.argv[2]), set(map(int, sys.argv[3:])))


if __name__ == "__main__":
    main()
