"""Runs a function in k worker processes of this machine, or in a worker process that torchrun started.

If a worker dies, the others would wait for it forever, so all are killed and started again; the function resumes from
what it keeps on disk. If a signal kills a worker twice at the same step, `launch` gives up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from rushhour.errors import ModelError, RushhourError
from rushhour.models.failure import why_failed
from rushhour.system import machine
from rushhour.system.faults import report_unexpected, user_code_line
from rushhour.train.parallel.interface import VARIABLE, choose_interface
from rushhour.train.parallel.position import Position, position_file, record_in, reset_positions
from rushhour.train.parallel.settings import Backend

_ECHO_S = 1.0
"""After an error of a worker, seconds to wait for the death or the error of another that caused it."""
_JOIN_S = 300.0
_POLL_S = 0.02
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
"""Signals of a fault in the process itself."""
_MOST_FAULTS = 3
"""Of these at different steps, before `launch` gives up: corrupted memory shows at one step or another."""


def under_torchrun() -> bool:
    """Whether torchrun, or a program that sets the same environment variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def launch(
    fn: Callable[..., Any],
    workers: int,
    args: tuple[Any, ...] = (),
    *,
    backend: Backend = "gloo",
    restarts: int = 0,
    threads: int | None = None,
) -> list[Any]:
    """Run `fn(*args)` in `workers` processes that form torch's default process group; one result per worker, by rank.

    Under torchrun this process is already one of the workers: `fn` is run in it, and the list holds its result only.

    Args:
        fn: of a module that a new process can import, so not of the main script; its result must be picklable.
        workers: processes; they connect on 127.0.0.1, at a port that the kernel chooses.
        args: picklable.
        backend: of torch.distributed; nccl needs a GPU for each worker, mpi a torch that was built with it.
        restarts: how often all are started again after one has died. After an error that `fn` raised they are not.
        threads: of each worker; by default an equal share of the machine's cores, at least 1.

    Raises:
        RushhourError: that `fn` raised, unchanged.
        ModelError: if a worker raised anything else, or died too often, or twice of one signal at the same step;
            torchrun's number of workers is another than `workers`; or torch was built without the backend.
    """
    if not dist.is_backend_available(backend):
        raise ModelError(
            f"cannot train over {backend}", f"torch {torch.__version__} was built without it", "use gloo, or that torch"
        )
    if under_torchrun():
        size = int(os.environ["WORLD_SIZE"])
        if size != workers:
            raise ModelError(
                f"{workers} workers were asked for, but torchrun started {size}",
                "both must be the same",
                f"use --workers {size}",
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        choose_interface(backend, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        with _group(backend, threads or _threads(here), **_rendezvous()):
            return [fn(*args)]
    # this process holds the store, so its port is free; each attempt has a prefix of its own
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]
    deaths: list[_Died] = []
    with position_file(workers) as file:
        for attempt in range(restarts + 1):
            try:
                return _once(fn, workers, args, backend, store.port, attempt, threads or _threads(workers), file)
            except _Died as death:
                if restarts and (fatal := _fatal(death, deaths, workers)) is not None:
                    raise fatal from death
                deaths.append(death)
                if attempt == restarts:
                    times = f" {attempt + 1} times" if attempt else ""
                    raise ModelError(
                        f"a worker died{times}: {death}",
                        "it was killed from outside, ran out of memory, or crashed",
                        "see its output above; use fewer workers if memory was short",
                    ) from death
                logging.getLogger(__name__).warning("%s; all workers start again from the last checkpoint", death)
    raise AssertionError("unreachable")


def _rendezvous() -> dict[str, Any]:
    """The store, rank and number of workers with which this worker of torchrun joins the process group.

    Torchrun keeps its store through restarts, with the addresses of workers that died. So rank 0 chooses a new, random
    prefix for the group, and sends it to the workers that announce themselves under random names.
    """
    store, rank, size = next(iter(dist.rendezvous("env://")))  # type: ignore[attr-defined]
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", own)
        group = store.get(f"welcome/{own}").decode()
        store.set(f"joined/{group}/{rank}", "")
    else:
        group, missing, until = own, set(range(1, size)), time.monotonic() + _JOIN_S
        while missing:
            for other in tuple(missing):
                if store.check([f"hello/{other}"]):  # it may be that of a dead worker; its successor's follows
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", group)
                if store.check([f"joined/{group}/{other}"]):
                    missing.discard(other)
            if missing and time.monotonic() > until:
                raise ModelError(
                    f"workers {sorted(missing)} of {size} did not join within {_JOIN_S:.0f} s",
                    "torchrun has not started them, or they died",
                    "check the output on the other machines",
                )
            time.sleep(_POLL_S)
    own_store = dist.PrefixStore(group, store)  # type: ignore[attr-defined]
    return {"store": own_store, "rank": rank, "world_size": size}


class _Died(Exception):
    """A worker ended without a result.

    Args:
        worker: its rank and the number of workers, in words.
        signal: that killed it; None if none did.
        step: of the optimizer that it was at, from 1; 0 before the first; None where it is not known.
        layer: that it was at; empty where it is not known.
    """

    def __init__(self, worker: str, signal: int | None, step: int | None, layer: str) -> None:
        self.worker, self.signal, self.step, self.layer = worker, signal, step, layer
        end = "failed" if signal is None else f"got {_named(signal)}"
        super().__init__(f"{worker} {end}{_place(step, layer)}")


def _place(step: int | None, layer: str) -> str:
    at = "" if step is None else f" at step {step}" if step else " before the first step"
    return at + (f", in {layer}" if layer else "")


def _named(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _fatal(death: _Died, before: Sequence[_Died], workers: int) -> ModelError | None:
    """The error to end with, where another start would die in the same way; else None."""
    if death.signal is None:
        return None
    same = [one for one in before if (one.signal, one.step) == (death.signal, death.step) and one.step is not None]
    faults = [one for one in (*before, death) if one.signal in _FAULTS]
    if not same and (death.signal not in _FAULTS or len(faults) < _MOST_FAULTS):
        return None
    threads = f"another number of --workers than {workers}, which also changes the number of threads"
    if same:
        what = f"{death.worker} died of {_named(death.signal)} twice{_place(death.step, death.layer)}"
    else:
        steps = ", ".join("?" if one.step is None else str(one.step) for one in faults)
        what = (
            f"{death.worker} died of {_named(death.signal)}{_place(death.step, death.layer)}, after others at {steps}"
        )
    if death.signal in _FAULTS:
        return ModelError(
            what, "a native library failed, or something corrupted memory", f"try --no-channels-last, or {threads}"
        )
    return ModelError(what, "it ran out of memory, or another process killed it", f"free memory, or try {threads}")


def _once(
    fn: Callable[..., Any],
    workers: int,
    args: tuple[Any, ...],
    backend: Backend,
    port: int,
    attempt: int,
    threads: int,
    file: Path,
) -> list[Any]:
    reset_positions(file, workers)
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(workers)]
    quiet = logging.getLogger("torch.multiprocessing.spawn")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of every process that it kills
    # Ctrl-C while a worker still imports would print a traceback: SIGINT is blocked until the worker runs `fn`
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _without_main():
            context = multiprocessing.start_processes(  # type: ignore[no-untyped-call, attr-defined]
                _worker,
                (fn, args, [sender for _, sender in pipes], workers, backend, port, attempt, threads, file),
                workers,
                join=False,
            )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        raise
    for _, sender in pipes:
        sender.close()
    results: dict[int, Any] = {}
    failed: RushhourError | None = None
    raised: list[tuple[int, str]] = []
    waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
    died: set[int] = set()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a SIGINT here kills the workers too
        while waiting and failed is None and not died:
            # an error may be the consequence of a death, or of a clearer error, in another worker
            readable = wait_for_any(list(waiting), _ECHO_S if raised else None)
            if not readable:
                break
            for receiver in readable:
                assert isinstance(receiver, Connection)
                rank = waiting.pop(receiver)
                try:
                    good, value = receiver.recv()
                except EOFError:
                    died.add(rank)
                    continue
                if good:
                    results[rank] = value
                elif isinstance(value, RushhourError):
                    failed = failed or value
                else:
                    raised.append((rank, value))
        if failed is not None:
            raise failed
        if died:
            codes = {}
            for rank in sorted(died):
                context.processes[rank].join(5)
                codes[rank] = context.processes[rank].exitcode or 0
            first = min(codes, key=lambda rank: codes[rank] >= 0)  # one that a signal killed, if there is one
            ended = -codes[first] if codes[first] < 0 else None
            raise _Died(f"worker {first} of {workers}", ended, *Position(file, first).read())
        if raised:
            rank, error = raised[0]
            raise ModelError(
                f"worker {rank} of {workers} failed", error, "correct that, and run the same command again"
            )
        for process in context.processes:
            process.join()
        return [results[rank] for rank in range(workers)]
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for receiver, _ in pipes:
            receiver.close()
        quiet.setLevel(level)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the main script again: without a guard it would train once more in each."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    try:
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _worker(
    rank: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    senders: list[Connection],
    workers: int,
    backend: Backend,
    port: int,
    attempt: int,
    threads: int,
    file: Path,
) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for other, sender in enumerate(senders):
        if other != rank:
            sender.close()  # else the parent would not see the end of the pipe when its worker dies
    record_in(Position(file, rank, layers=attempt > 0))  # layers only after a death: they take time
    outcome: tuple[bool, Any]  # and its result, an error for the user, or any other error in words
    try:
        os.environ.setdefault(VARIABLE, "lo")
        store = dist.PrefixStore(str(attempt), dist.TCPStore("127.0.0.1", port, None, False))  # type: ignore[attr-defined]
        with _group(backend, threads, store=store, rank=rank, world_size=workers):
            outcome = True, fn(*args)
    except RushhourError as error:
        outcome = False, error
    except Exception as error:
        outcome = False, why_failed(error) if user_code_line(error) else report_unexpected(error, "training")
    senders[rank].send(outcome)
    senders[rank].close()


@contextlib.contextmanager
def _group(backend: Backend, threads: int, **where: Any) -> Iterator[None]:
    torch.set_num_threads(threads)
    try:
        dist.init_process_group(backend, **where)
    except RuntimeError as error:
        raise ModelError(
            f"worker {where['rank']} of {where['world_size']} cannot connect to the others over {backend}",
            str(error).strip().splitlines()[0],
            f"let the machines reach each other at all ports, or set {VARIABLE} to the interface between them",
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _threads(workers: int) -> int:
    return max(1, machine.cores() // workers)
