"""`ServeSettings`: where and how a server listens, and what it allows."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any

import msgspec

from rushhour.errors import ServeError
from rushhour.plan import Plan
from rushhour.serve.access.certificates import Identity
from rushhour.serve.access.exposure import is_loopback
from rushhour.serve.access.origin import is_host
from rushhour.serve.limits import Limits
from rushhour.serve.memory.shared_memory import Register
from rushhour.serve.node import Fit
from rushhour.serve.observability.log import LogFormat, LogLevel
from rushhour.serve.seats import Seat

_Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
_EVERY_ADDRESS = frozenset(("", "0.0.0.0", "::"))


class Served(msgspec.Struct, frozen=True):
    """One of the models of a server.

    Attributes:
        path: of the target: a run, a plan or a bundle. A reload opens it again.
        name: for clients.
        weight: its share of the cores, relative to those of the other models, while all have work.
        unloaded: it is not loaded at the start.
        plan: what is served, whatever is at the path by now: it holds the bundle's hash. None is what is there.
        folder: that the plan's bundles are in.
        fit: how this machine differs from the plan's; None where it does not, and where that is not known yet.
        versions: of the bundles that were served, by their hashes; a restarted worker process continues with them.
    """

    path: str
    name: str
    weight: float = 1.0
    unloaded: bool = False
    plan: Plan | None = None
    folder: str = ""
    fit: Fit | None = None
    versions: dict[str, int] = {}


class ServeSettings(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        host: loopback by default: other machines can connect only if the user decides so.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None serves over HTTP only.
        model: the name of a single model for clients; None takes that of the model that was tuned, or the bundle's.
        models: what is served, where that is not a single target; and in worker processes.
        repository: a folder of further models that clients may load; None where there are no others.
        trusted: factories (`module:factory`) that the torch engine may import beside Rushhour's own networks.
        limits: what one client may use.
        api_keys: clients must send one of these; empty accepts every request.
        api_key_file: that they are read from, at the start and whenever the file changes.
        tls_certificate: path of the certificate chain, with `tls_key`; None serves without TLS. Both are read again
            whenever they change.
        known_as: further names of the server, as behind a proxy: without keys, changes are accepted only under its own
            names, so that no web page can request them.
        exposed: confirms listening on an address that other machines can reach, without keys.
        admin: whether clients may load and unload the model, and set what is logged.
        admin_port: where they may, and nowhere else; 0 takes a free one. None is the port of all requests.
        admin_host: the address of that port; None is 127.0.0.1.
        shared_memory: whether clients may have the server open shared memory of this machine and read and write it:
            any that the server's user may. None allows it where only this machine can connect to the server.
        log_format: None is text on a terminal, else JSON.
        log_level: records of this level and above are logged.
        log_requests: one record for each request.
        server_timing: whether an answer gives its times and its variant.
        otel: whether spans of requests are sent to OTEL_EXPORTER_OTLP_ENDPOINT.
        otel_sample: the fraction of requests that are traced where the client does not decide; None is all.
        cells: worker processes behind the port, each with its share of the cores; None takes the plan's.
        streams: batches that each worker process runs at the same time; None takes the plan's, or as many as fit.
        threads: CPU threads of each stream; likewise.
        drain_delay_s: after a signal to stop, requests are still accepted for so long, while readiness is false.
        drain_timeout_s: after that, time for what is in flight; what takes longer is cut off.
        frozen_s: a worker process that does not respond to its supervisor for so long is killed and restarted.
        exact: serve as the plan's first variant says or fail: a measurement needs exactly that. Else a machine that
            cannot run it takes the best variant that it can run.
        strict: refuse to serve on a machine that differs from the plan's.
        fixed: serve the plan's first variant whatever the load, though the plan has a ladder.
        one_of_many: this server is a worker process: it shares the port, and changes are made in all.
        seat: what it shares with the others beside the port; None shares nothing.
        regions: of shared memory that clients have registered; a restarted worker process continues with them.
        identity: the certificate and key in use; likewise.
    """

    host: str = "127.0.0.1"
    http_port: _Port = 8000
    grpc_port: _Port | None = None
    model: str | None = None
    models: tuple[Served, ...] = ()
    repository: str | None = None
    trusted: tuple[str, ...] = ()
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    known_as: tuple[str, ...] = ()
    exposed: bool = False
    admin: bool = True
    admin_port: _Port | None = None
    admin_host: str | None = None
    shared_memory: bool | None = None
    log_format: LogFormat | None = None
    log_level: LogLevel = "info"
    log_requests: bool = False
    server_timing: bool = True
    otel: bool = False
    otel_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    cells: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    streams: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    drain_delay_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    frozen_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 5.0
    exact: bool = True
    strict: bool = False
    fixed: bool = False
    one_of_many: bool = False
    seat: Seat | None = None
    regions: tuple[Register, ...] = ()
    identity: Identity | None = None

    @property
    def shares_cores(self) -> bool:
        """Whether several models may compute on the same cores."""
        return len(self.models) > 1 or self.repository is not None

    @property
    def administration_host(self) -> str:
        """The address of the port for administration."""
        return self.admin_host or "127.0.0.1"

    @property
    def shares_memory(self) -> bool:
        """Whether clients may use shared memory: by default only if all of them are on this machine."""
        return is_loopback(self.host) and not self.exposed if self.shared_memory is None else self.shared_memory

    @property
    def sampled(self) -> float:
        """The fraction of requests that are traced where the client does not decide."""
        return 1.0 if self.otel_sample is None else self.otel_sample

    @property
    def trace_settings(self) -> dict[str, Any]:
        """Under the names of the protocol's trace extension."""
        if not self.otel:
            return {"trace_level": ["OFF"]}
        return {
            "trace_level": ["TIMESTAMPS"],
            "trace_mode": "opentelemetry",
            "trace_rate": str(round(1 / self.sampled) if self.sampled else 0),
        }

    def shown(self, admin_address: str | None) -> dict[str, Any]:
        """The settings in force as `/config` shows them, defaults filled in, without secrets."""
        return {
            "host": self.host,
            "http_port": self.http_port,
            "grpc_port": self.grpc_port,
            "admin": self.admin,
            "admin_address": admin_address,
            "api_keys": bool(self.api_keys),
            "tls": self.tls_certificate is not None,
            "exposed": self.exposed,
            "shared_memory": self.shares_memory,
            "limits": self.limits,
            "fixed": self.fixed,
            "drain_delay_s": self.drain_delay_s,
            "drain_timeout_s": self.drain_timeout_s,
            "log_format": self.log_format,
            "log_requests": self.log_requests,
            "server_timing": self.server_timing,
            "otel": self.otel,
            "otel_sample": self.sampled if self.otel else None,
        }

    def __post_init__(self) -> None:
        for name in ("host", "admin_host"):  # an address of IPv6 may be written as in URLs
            value = getattr(self, name)
            if value and value.startswith("[") and value.endswith("]"):
                msgspec.structs.force_setattr(self, name, value[1:-1])

    def check(self) -> None:
        """Refuse options that could not take effect.

        Raises:
            ServeError: naming the first of them.
        """
        if self.admin_port is not None and not self.admin:
            raise ServeError("--admin-port has no effect", "--no-admin switches administration off", "omit one of them")
        if self.admin_host is not None and self.admin_port is None:
            raise ServeError("--admin-host has no effect", "there is no --admin-port", "give one, or omit it")
        self._check_ports()
        if self.model is not None and self.models:
            raise ServeError("`model` has no effect", "each of `models` has its own name", "give one of both")
        for name in self.known_as:
            if not is_host(name):
                why = "it is compared with the host that a request names, without scheme, port and path"
                raise ServeError(f"--known-as {name!r} has no effect", why, "give for example api.example.com")
        if self.api_key_file is not None and self.api_keys and not self.one_of_many:
            raise ServeError("API keys are given twice", "the key file would replace the others", "give one of both")
        if self.otel_sample is not None and not self.otel:
            raise ServeError("--otel-sample has no effect", "tracing is off", "give --otel, or omit it")
        if self.log_requests and self.log_level not in ("debug", "info"):
            level = f"requests are logged at level info, and the level is {self.log_level}"
            raise ServeError("--log-requests has no effect", level, "give --log-level info, or omit it")

    def _check_ports(self) -> None:
        places = [
            ("--http-port", self.host, self.http_port),
            ("--grpc-port", self.host, self.grpc_port),
            ("--admin-port", self.administration_host, self.admin_port),
        ]
        for (one, its_host, its_port), (other, host, port) in combinations(places, 2):
            if port and port == its_port and _overlap(its_host, host):
                raise ServeError(f"{one} and {other} are both {port}", "each needs a port of its own", "change one")


def _overlap(one: str, other: str) -> bool:
    """Whether two hosts may have an address in common."""
    hosts = {one, other}
    local = "localhost" in hosts and all(map(is_loopback, hosts))
    return len(hosts) == 1 or local or bool(hosts & _EVERY_ADDRESS)
