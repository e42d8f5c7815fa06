"""Where and how a server listens, and whom it lets in."""

from __future__ import annotations

from typing import Annotated

import msgspec

from rushhour.errors import ServeError
from rushhour.plan import Plan
from rushhour.serve.observability.log import LogFormat
from rushhour.serve.processes.messages import LogLevel, Register
from rushhour.serve.protocols.limits import Identity, Limits, is_loopback

_Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]


class Served(msgspec.Struct, frozen=True):
    """What is served, wherever the path leads by now: the bundle's hash is in the plan.

    Attributes:
        plan: as it was read.
        folder: that its bundles lie in.
    """

    plan: Plan
    folder: str


class ServeSettings(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        host: loopback by default: exposing a server is a decision, not a default.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None serves over HTTP only.
        model: the model's name on the wire; None takes that of the model that was tuned, or the bundle's.
        trusted: factories (`module:factory`) that the torch engine may import beside Rushhour's own networks.
        limits: what one connection may cost.
        api_keys: clients must send one of these; empty lets everybody in.
        api_key_file: where they are read from, at the start and whenever the file changes.
        tls_certificate: path of the certificate chain, with `tls_key`; None serves without TLS. Both are read again
            whenever they change.
        known_as: further names by which users know the server, as behind a proxy: without keys, changes are taken under
            its own names only, so that no web page can ask for them.
        exposed: listening for everybody, without keys, is meant.
        admin: whether clients may load and unload the model, and set what is logged.
        admin_port: where they may, and nowhere else; 0 takes a free one. None is the port of everybody.
        admin_host: where that listens; None is 127.0.0.1.
        shared_memory: whether clients may have the server open shared memory of this machine and read and write it:
            any that the server's user may. None lets them where only this machine reaches the server.
        log_format: None is text on a terminal, else JSON.
        log_level: what is logged is at least so serious.
        log_requests: one record for each request.
        otel: whether spans are made of requests, and sent to where OTEL_EXPORTER_OTLP_ENDPOINT says.
        otel_sample: the share of requests that are traced where the client does not say; None is all.
        cells: processes behind the port, each with its share of the cores; None takes the plan's.
        streams: batches that each cell runs at the same time; None takes the plan's, or as many as there is room for.
        threads: CPU threads of each stream; likewise.
        drain_delay_s: from a signal to stop, for so long requests are still welcome, while readiness says no.
        drain_timeout_s: after that, for so long what is under way may take; what takes longer is cut off.
        frozen_s: a cell that does not answer its supervisor for so long is killed and started again.
        exact: serve as the plan's first variant says or not at all: what is measured must be what was meant. Else a
            machine that cannot run it rightly takes the best way that it can.
        one_of_many: this server is such a cell: it shares the port, and changes are made in all.
        versions: of the bundles that were served, by their hashes; a cell that is started again goes on with
            them.
        unloaded: the model has been unloaded; likewise.
        regions: of shared memory that clients have registered; likewise.
        identity: the certificate and key in use; likewise.
        served: what the others serve; likewise.
    """

    host: str = "127.0.0.1"
    http_port: _Port = 8000
    grpc_port: _Port | None = None
    model: str | None = None
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
    otel: bool = False
    otel_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    cells: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    streams: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    drain_delay_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    frozen_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 5.0
    exact: bool = True
    one_of_many: bool = False
    versions: dict[str, int] = {}
    unloaded: bool = False
    regions: tuple[Register, ...] = ()
    identity: Identity | None = None
    served: Served | None = None

    @property
    def shares_memory(self) -> bool:
        """Whether clients may use shared memory: by default only if all of them are on this machine."""
        return is_loopback(self.host) and not self.exposed if self.shared_memory is None else self.shared_memory

    def check(self) -> None:
        """Refuse options that could not take effect.

        Raises:
            ServeError: naming the first of them.
        """
        if self.admin_port is not None and not self.admin:
            raise ServeError("--admin-port has no effect", "--no-admin switches off what it is for", "leave one out")
        if self.admin_host is not None and self.admin_port is None:
            raise ServeError("--admin-host has no effect", "there is no --admin-port", "give one, or leave it out")
        if self.api_key_file is not None and self.api_keys and not self.one_of_many:
            raise ServeError("there are keys beside those in a file", "the file would replace them", "give one of both")
        if self.otel_sample is not None and not self.otel:
            raise ServeError("--otel-sample has no effect", "tracing is off", "give --otel, or leave it out")
        if self.log_requests and self.log_level not in ("debug", "info"):
            level = f"requests are logged at level info, and the level is {self.log_level}"
            raise ServeError("--log-requests has no effect", level, "give --log-level info, or leave it out")
