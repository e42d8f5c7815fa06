"""`serve`: opens what plans name, and serves it with one worker process or several."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from rushhour.clock import WallClock
from rushhour.errors import ServeError
from rushhour.serve.access.certificates import read_identity
from rushhour.serve.access.exposure import check_exposure
from rushhour.serve.access.keys import Keys
from rushhour.serve.hosting import Folder, check_memory, open_served, with_plan
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
from rushhour.serve.scheduling.cores import Cores
from rushhour.serve.service import Service, Shared
from rushhour.serve.settings import Served, ServeSettings
from rushhour.serve.target import Target, open_target
from rushhour.serve.worker import CLOSE_SECONDS, SPANS_SECONDS, Ready, Worker, closing_s
from rushhour.system.machine import cores, open_files

_LAST_RECORDS_SECONDS = 0.2
_OTHER_FILES = 256
_OWN_FILES = 64
"""That a server opens beside its connections, at most: engines, event loops, gRPC."""
_FEWEST_CONNECTIONS = 16
_GRPC_AGE_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class _Model:
    """One of the models, with its target as it is served here."""

    served: Served
    target: Target


def serve(
    target: Target | Sequence[Served],
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
        target: what to serve: one model, or several behind one port.
        settings: where and how.
        ready: called once when requests are accepted.
        open_with: opens engines; the plan's own by default. Not used with several worker processes.
        watchdog: the connection to the parent process.

    Raises:
        ServeError: if a port cannot be bound, or memory cannot hold the models.
        PlanError, BundleError: as `open_target`.
        EngineError: if a plan's engine cannot run as the plan says.
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
        models = [_fitting(model, settings) for model in _models(target, settings)]
        planned = max(model.target.plan.policy.cells for model in models)
        cells = settings.cells or (planned if settings.exact else min(planned, cores()))
        several = cells > 1 and not settings.one_of_many
        cells = cells if several else 1
        models = [
            dataclasses.replace(model, target=_with_layout(model.target, settings, cells, model.served.fit))
            for model in models
        ]
        settings = msgspec.structs.replace(settings, models=tuple(model.served for model in models), model=None)
        if settings.shares_cores and not settings.one_of_many:
            check_memory({each.served.name: each.target for each in models if not each.served.unloaded}, cells)
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
                started = runner.run(_supervise(models, settings, cells, ready))
            else:
                runner.run(_serve(models, settings, open_with or opener(settings.trusted), ready, watchdog))
                started = True
        interrupted = SIGNALS.interrupted
    if interrupted and not started:
        sys.exit(130)


def _models(target: Target | Sequence[Served], settings: ServeSettings) -> list[_Model]:
    """The models with their targets, as these were made."""
    if isinstance(target, Target):
        return [_Model(Served(str(target.path), settings.model or target.name), target)]
    return [_Model(served, open_served(served)) for served in target]


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


def _with_layout(target: Target, settings: ServeSettings, cells: int, fit: Fit | None) -> Target:
    """The target with the streams and threads of the settings, or with those that fit this number of worker processes.

    Raises:
        ServeError: if the settings need more cores than there are.
    """
    room = max(1, len(os.sched_getaffinity(0)) // cells) if cells > 1 else cores()
    given = bool(settings.streams or settings.threads)
    target = target.with_layout(settings.streams, settings.threads, room)
    if not given and fit is not None and not settings.one_of_many:
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


def _fitting(model: _Model, settings: ServeSettings) -> _Model:
    """The model with how this machine differs from its plan's, where that changes how it is served.

    Raises:
        ServeError: if it differs, and the settings are strict.
    """
    if settings.one_of_many:
        return model  # the supervisor has found that out
    target = model.target
    fit = fit_of(target.plan) if settings.strict or not settings.exact else None
    if fit is not None and settings.strict:
        raise ServeError(
            f"will not serve {target.path} with --strict",
            f"this is not the Plan's machine: {', '.join(fit.differences)}",
            "tune on this machine, or omit --strict",
        )
    return dataclasses.replace(model, served=msgspec.structs.replace(model.served, fit=fit))


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


def _reopened(path: str, settings: ServeSettings, cells: int, fit: Fit | None = None) -> Target:
    return _with_layout(open_target(Path(path)), settings, cells, fit)


async def _supervise(models: Sequence[_Model], settings: ServeSettings, cells: int, ready: Ready) -> bool:
    """Serve with several worker processes; returns whether they were ready before the end."""
    with contextlib.ExitStack() as stack:
        ports = {
            name: None if port is None else held(stack, name, host, port, bind_reserved)[0].getsockname()[1]
            for name, (host, port) in _addresses(settings).items()
        }
        served = tuple(with_plan(model.served, model.target) for model in models)
        shared = msgspec.structs.replace(settings, **ports, cells=None, one_of_many=True, models=served)
        grpc = None if shared.grpc_port is None else host_and_port(settings.host, shared.grpc_port)
        log.event(logging.INFO, "start", target=_said(models), cells=cells)
        supervisor = Supervisor(
            shared,
            cores_of_each(cells, sorted(os.sched_getaffinity(0))),
            lambda model: _reopened(model.path, settings, cells, model.fit),
            _folder(settings),
            closing_s(settings),
        )

        def all_ready(url: str, way: str) -> None:
            log.event(logging.INFO, "all cells ready", url=url, grpc=grpc)
            each = f"{cells} cells, each "
            ready(url, grpc, "\n".join(each + line for line in way.splitlines()))

        started = await supervisor.run(all_ready)
        log.event(logging.INFO, "all cells stopped")
        return started


def _said(models: Sequence[_Model]) -> str:
    return ", ".join(model.served.path for model in models)


def _folder(settings: ServeSettings) -> Folder | None:
    """Where further models are found."""
    if settings.repository is None:
        return None
    return Folder(Path(settings.repository), {model.name: model.weight for model in settings.models})


def _addresses(settings: ServeSettings) -> dict[str, tuple[str, int | None]]:
    """Where to listen, by the name of the setting."""
    return {
        "http_port": (settings.host, settings.http_port),
        "grpc_port": (settings.host, settings.grpc_port),
        "admin_port": (settings.administration_host, settings.admin_port),
    }


async def _serve(
    models: Sequence[_Model],
    settings: ServeSettings,
    open_with: Opener,
    ready: Ready,
    watchdog: ParentWatchdog | None,
) -> None:
    # Ports are bound before models are loaded, to report at once that one is in use; they listen only when ready.
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
            log.event(logging.INFO, "start", target=_said(models), cells=1)
        observer = stack.enter_context(_observing(settings))
        regions = SharedMemory(settings.limits.body_bytes) if settings.shares_memory else None
        repository = _repository(models, settings, open_with, regions)
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
            for model in settings.models:
                service = repository.named(model.name)
                await (service.unload() if model.unloaded else service.load())
                if model.fit is not None and service.loaded is not None and not settings.one_of_many:
                    share = service.loaded.plan_share
                    log.event(logging.WARNING, model.fit.line(share), model=model.name, share=share)
            _report_shares(repository)
            first = listeners["http_port"][0].getsockname()
            port = grpc[0].getsockname()[1] if grpc else None
            bound = msgspec.structs.replace(settings, http_port=first[1], grpc_port=port)
            worker = Worker(repository, bound, commands, regions, execute, observer, listeners.get("admin_port"))
            await worker.run(listeners["http_port"], [host_and_port(*sock.getsockname()[:2]) for sock in grpc], ready)
        finally:
            await asyncio.gather(*(service.unload(CLOSE_SECONDS) for service in repository.services.values()))
        log.event(logging.INFO, "stopped")


def _report_shares(repository: Repository) -> None:
    """Log what each of several models can count on."""
    for service in repository.services.values():
        if service.shared.cores is not None and service.loaded is not None:
            least, of = service.shared.cores.least(service.weight), service.shared.cores.size
            how = str(service.loaded.variant)
            log.event(
                logging.INFO, "share", model=service.name, weight=service.weight, cores=round(least, 2), of=of, runs=how
            )


def _repository(
    models: Sequence[_Model], settings: ServeSettings, open_with: Opener, regions: SharedMemory | None
) -> Repository:
    """The models, not loaded yet."""
    cores_shared = Cores(cores(), WallClock()) if settings.shares_cores else None
    explanation = Explanation() if settings.server_timing else None
    shared = Shared(settings.limits, explanation, cores_shared, len(models))

    def service(served: Served, target: Target) -> Service:
        return Service(
            target,
            served.name,
            open_with,
            served.versions,
            regions,
            settings.limits,
            settings.exact,
            partial(_reopened, served.path, settings, 1, served.fit),
            served.fit,
            fixed=settings.fixed,
            shared=shared,
            weight=served.weight,
        )

    def joining(served: Served, target: Target) -> Service:
        return service(served, _with_layout(target, settings, 1, served.fit))

    services = [service(model.served, model.target) for model in models]
    return Repository(services, shared, _folder(settings), joining)


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
