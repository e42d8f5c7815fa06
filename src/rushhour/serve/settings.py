"""Where and how a server listens, and whom it lets in."""

from __future__ import annotations

from typing import Annotated

import msgspec

from rushhour.serve.guard import Limits


class ServeSettings(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        host: loopback by default: exposing a server is a decision, not a default.
        http_port: 0 takes a free one.
        grpc_port: 0 takes a free one; None serves over HTTP only.
        model: the model's name on the wire; None takes the bundle's.
        trusted: factories (`module:factory`) that the torch engine may import beside Rushhour's own networks.
        limits: what one connection may cost.
        api_keys: clients must send one of these; empty lets everybody in.
        tls_certificate: path of the certificate chain, with `tls_key`; None serves without TLS.
        exposed: listening for everybody, without keys, is meant.
        admin: whether clients may load and unload the model.
        shared_memory: whether clients may have the server open shared memory of this machine and read and write it:
            any that the server's user may. Several cells share no registrations, and take none.
        cells: processes behind the port, each with its share of the cores; None takes the plan's.
        one_of_many: this server is such a cell: it shares the port, and changes are made in all.
        version: that the model begins with; a cell that is started again begins where the others are.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = None
    model: str | None = None
    trusted: tuple[str, ...] = ()
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = ()
    tls_certificate: str | None = None
    tls_key: str | None = None
    exposed: bool = False
    admin: bool = True
    shared_memory: bool = True
    cells: Annotated[int, msgspec.Meta(ge=1, le=256)] | None = None
    one_of_many: bool = False
    version: int = 1
