"""`serve`: opens what a plan names, and serves it with one worker process or several."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from rushhour.clock import WallClock
from rushhour.errors import ServeError
from rushhour.serve.access.certificates import read_identity
from rushhour.serve.access.exposure import check_exposure
from rushhour.serve.access.keys import Keys
from rushhour.serve.memory import allocator
from rushhour.serve.memory.shared_memory import SharedMemory
from rushhour.serve.node import Fit, fit_of
from rushhour.serve.observability import log
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.observability.requests import Observer
from rushhour.serve.opening import Opener, opener
from rushhour.serve.processes.commands import Commands
from rushhour.serve.processes.messages import Execute
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.processes.supervisor import Supervisor, cores_of_each
from rushhour.serve.processes.watchdog import ParentWatchdog
from rushhour.serve.protocols.listener import bind_alone, bind_reserved, bind_shared, held, host_and_port
from rushhour.serve.repository import Repository
from rushhour.serve.settings import ServeSettings
from rushhour.serve.target import Target, open_target
from rushhour.serve.worker import CLOSE_SECONDS, SPANS_SECONDS, Ready, Worker, closing_s
from rushhour.system.machine import cores, open_files

_LAST_RECORDS_SECONDS = 0.2
_OTHER_FILES = 256
_OWN_FILES = 64
"""That a server opens beside its connections, at most: engines, event loops, gRPC."""
_FEWEST_CONNECTIONS = 16
_GRPC_AGE_SECONDS = 60.0


def serve(
    target: Target,
    settings: ServeSettings,
    ready: Ready,
    *,
    open_with: Opener | None = None,
    watchdog: ParentWatchdog | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then accept no new connections, answer what is in flight, and return.

    A second signal ends the process at once, as does the first one before the server is ready. SIGHUP reads API keys
    and certificates again.

    Args:
        target: what to serve.
        settings: where and how.
        ready: called once when requests are accepted.
        open_with: opens engines; the plan's own by default. Not used with several worker processes.
        watchdog: the connection to the parent process.

    Raises:
        ServeError: if a port cannot be bound.
        EngineError: if the plan's engine cannot run as the plan says.
    """
    with SIGNALS.installed():
        settings.check()
        settings = _with_secrets(settings)
        check_exposure(settings.host, settings.api_keys, exposed=settings.exposed)
        requested = settings.limits.connections
        settings = _with_room(settings)
        allocator.fix_thresholds()
        if settings.admin_port is not None:
            check_exposure(settings.administration_host, settings.api_keys, exposed=settings.exposed)
        settings = msgspec.structs.replace(settings, fit=_fit(target, settings))
        planned = target.plan.policy.cells
        cells = settings.cells or (planned if settings.exact else min(planned, cores()))
        several = cells > 1 and not settings.one_of_many
        target = _with_layout(target, settings, cells if several else 1)
        limits = settings.limits
        if limits.grpc_age_s is None and (several or settings.one_of_many):
            limits = msgspec.structs.replace(limits, grpc_age_s=_GRPC_AGE_SECONDS)
        form = settings.log_format or log.default_format()
        settings = msgspec.structs.replace(settings, log_format=form, limits=limits)
        with log.to_stderr(form, settings.log_level), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            SIGNALS.before_exit = _before_exit
            if limits.connections < requested and not settings.one_of_many:
                why = "the limit on open files (ulimit -n) allows no more"
                log.event(
                    logging.WARNING, "fewer connections", connections=limits.connections, asked=requested, why=why
                )
            if several:
                started = runner.run(_supervise(target, settings, cells, ready))
            else:
                runner.run(_serve(target, settings, open_with or opener(settings.trusted), ready, watchdog))
                started = True
        interrupted = SIGNALS.interrupted
    if interrupted and not started:
        sys.exit(130)


def _with_secrets(settings: ServeSettings) -> ServeSettings:
    """The settings with the keys and the certificate that their files hold now.

    Raises:
        ServeError: if they cannot be used.
    """
    if settings.one_of_many:
        return settings  # the supervisor has read them: a restarted worker process uses what the others use
    keys = Keys.read(Path(settings.api_key_file)) if settings.api_key_file else settings.api_keys
    pair = (Path(file) if file else None for file in (settings.tls_certificate, settings.tls_key))
    return msgspec.structs.replace(settings, api_keys=keys, identity=read_identity(*pair))


def _with_layout(target: Target, settings: ServeSettings, cells: int) -> Target:
    """The target with the streams and threads of the settings, or with those that fit this number of worker processes.

    Raises:
        ServeError: if the settings need more cores than there are.
    """
    room = min(map(len, cores_of_each(cells, sorted(os.sched_getaffinity(0))))) if cells > 1 else cores()
    given = bool(settings.streams or settings.threads)
    target = target.with_layout(settings.streams, settings.threads, room)
    if not given and settings.fit is not None and not settings.one_of_many:
        target = target.scaled_to(room)
    policy = target.plan.policy
    if not given and cells not in (1, policy.cells):
        return target.fitted_to(room)  # the plan's layout is that of another number of worker processes
    if given and policy.streams * policy.threads > room:
        raise ServeError(
            f"cannot run {policy.streams} streams of {policy.threads} threads in each of {cells} worker processes",
            f"each has {room} of this machine's cores",
            "give smaller --streams, --threads or --cells",
        )
    return target


def _fit(target: Target, settings: ServeSettings) -> Fit | None:
    """How this machine differs from the plan's, where that changes how it is served.

    Raises:
        ServeError: if it differs, and the settings are strict.
    """
    if settings.one_of_many:
        return settings.fit
    fit = fit_of(target.plan) if settings.strict or not settings.exact else None
    if fit is not None and settings.strict:
        raise ServeError(
            f"will not serve {target.path} with --strict",
            f"this is not the Plan's machine: {', '.join(fit.differences)}",
            "tune on this machine, or omit --strict",
        )
    return fit


def _with_room(settings: ServeSettings) -> ServeSettings:
    """The settings with as many connections as the limit on open files allows, once it is raised.

    Raises:
        ServeError: if it allows fewer than 16.
    """
    limits = settings.limits
    files, used = open_files(limits.connections + _OTHER_FILES)
    if files >= limits.connections + _OTHER_FILES:
        return settings
    kinds = 1 if settings.grpc_port is None else 2
    room = (files - used - _OWN_FILES) // kinds
    if room < min(_FEWEST_CONNECTIONS, limits.connections):
        raise ServeError(
            f"this process may open only {files} files",
            f"a server needs at least {used + _OWN_FILES + kinds * _FEWEST_CONNECTIONS}",
            "raise the limit: ulimit -n 4096",
        )
    fewer = msgspec.structs.replace(limits, connections=min(limits.connections, room))
    return msgspec.structs.replace(settings, limits=fewer)


def _before_exit() -> None:
    """Called before a signal ends the process at once."""
    if not SIGNALS.stopping:
        log.event(logging.INFO, "stopped before it served")
    log.flush(_LAST_RECORDS_SECONDS)


def _reopened(path: Path, settings: ServeSettings, cells: int) -> Target:
    return _with_layout(open_target(path), settings, cells)


async def _supervise(target: Target, settings: ServeSettings, cells: int, ready: Ready) -> bool:
    """Serve with several worker processes; returns whether they were ready before the end."""
    with contextlib.ExitStack() as stack:
        ports = {
            name: None if port is None else held(stack, name, host, port, bind_reserved)[0].getsockname()[1]
            for name, (host, port) in _addresses(settings).items()
        }
        shared = msgspec.structs.replace(settings, **ports, cells=None, one_of_many=True)
        grpc = None if shared.grpc_port is None else host_and_port(settings.host, shared.grpc_port)
        log.event(logging.INFO, "start", target=str(target.path), cells=cells)
        supervisor = Supervisor(
            target,
            shared,
            cores_of_each(cells, sorted(os.sched_getaffinity(0))),
            partial(_reopened, target.path, settings, cells),
            closing_s(settings),
        )

        def all_ready(url: str, way: str) -> None:
            log.event(logging.INFO, "all cells ready", url=url, grpc=grpc)
            ready(url, grpc, f"{cells} cells, each {way}")

        started = await supervisor.run(all_ready)
        log.event(logging.INFO, "all cells stopped")
        return started


def _addresses(settings: ServeSettings) -> dict[str, tuple[str, int | None]]:
    """Where to listen, by the name of the setting."""
    return {
        "http_port": (settings.host, settings.http_port),
        "grpc_port": (settings.host, settings.grpc_port),
        "admin_port": (settings.administration_host, settings.admin_port),
    }


async def _serve(
    target: Target, settings: ServeSettings, open_with: Opener, ready: Ready, watchdog: ParentWatchdog | None
) -> None:
    # Ports are bound before the model is loaded, to report at once that one is in use; they listen only when ready.
    with contextlib.ExitStack() as stack:
        bind = bind_shared if settings.one_of_many else bind_alone
        addresses = _addresses(settings)
        listeners = {
            name: held(stack, name, host, port, bind)
            for name, (host, port) in addresses.items()
            if name != "grpc_port" and port is not None
        }
        grpc: list[socket.socket] = []
        if settings.grpc_port is not None:
            # Kept until the end: grpcio binds the port by itself, and only when all is ready.
            kept = bind_shared if settings.one_of_many else bind_reserved
            grpc = held(stack, "grpc_port", settings.host, settings.grpc_port, kept)
        if not settings.one_of_many:
            log.event(logging.INFO, "start", target=str(target.path), cells=1)
        observer = stack.enter_context(_observing(settings))
        regions = SharedMemory(settings.limits.body_bytes) if settings.shares_memory else None
        repository = Repository(
            target,
            settings.model,
            open_with,
            settings.versions,
            regions,
            settings.limits,
            settings.exact,
            partial(_reopened, target.path, settings, 1),
            settings.fit,
            fixed=settings.fixed,
            explanation=Explanation() if settings.server_timing else None,
        )
        commands = Commands(repository, regions)
        for region in settings.regions:
            lost = await commands.execute(region)
            if lost.wrong:
                log.event(logging.WARNING, "a region of shared memory is lost", region=region.name, error=lost.wrong)
        execute: Execute = commands.execute
        if watchdog is not None:
            watchdog.attach(commands.execute)
            execute = watchdog.in_all_processes if settings.one_of_many else execute
        try:
            await (repository.unload() if settings.unloaded else repository.load())
            if settings.fit is not None and repository.loaded is not None and not settings.one_of_many:
                share = repository.loaded.plan_share
                log.event(logging.WARNING, settings.fit.line(share), share=share)
            first = listeners["http_port"][0].getsockname()
            port = grpc[0].getsockname()[1] if grpc else None
            bound = msgspec.structs.replace(settings, http_port=first[1], grpc_port=port)
            worker = Worker(repository, bound, commands, regions, execute, observer, listeners.get("admin_port"))
            await worker.run(listeners["http_port"], [host_and_port(*sock.getsockname()[:2]) for sock in grpc], ready)
        finally:
            await repository.unload(CLOSE_SECONDS)
        log.event(logging.INFO, "stopped")


@contextlib.contextmanager
def _observing(settings: ServeSettings) -> Iterator[Observer | None]:
    """What follows single requests, if any are followed; buffered spans are sent at the end."""
    if not settings.otel:
        yield Observer(WallClock(), records=True) if settings.log_requests else None
        return
    from rushhour.serve.observability import tracing

    provider = tracing.exporting_provider(settings.sampled)
    try:
        yield Observer(WallClock(), records=settings.log_requests, spans=tracing.Spans(provider, WallClock()))
    finally:
        if not tracing.shut_down(provider, SPANS_SECONDS):
            why = f"the collector did not accept them within {SPANS_SECONDS:g} s"
            log.event(logging.WARNING, "spans lost", why=why)
