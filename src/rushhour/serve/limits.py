"""`Limits`: how many connections, bytes and seconds one client may use."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a connection may cost.

    Attributes:
        connections: open at the same time; further ones are answered 503 and closed.
        body_bytes: of a request, compressed or not; of its pictures, decoded.
        grpc_bytes: of a message over gRPC as it is sent, if that is less. grpcio copies a message in one go and blocks
            the event loop meanwhile: 5 to 25 ms for 16 MiB. Compressed messages are decompressed on threads.
        held_bytes: of all requests in one process: those that are read and not yet answered, and those that wait for
            the engine. Further ones are answered 429.
        header_bytes: of a request, with its target.
        request_s: from a request's first byte to its last. A client that sends slower is answered 408.
        idle_s: without a request; then the connection is closed.
        picture_pixels: of an encoded picture. Each thread that decodes needs 4 bytes for each.
        ping_s: the shortest time between two pings of a gRPC client; one that pings more often is disconnected (GOAWAY,
            too_many_pings). 0 allows any.
        keepalive_s: a gRPC client that sends nothing for so long is pinged, and its connection is closed if it does not
            answer; None never pings.
        grpc_age_s: after so long a gRPC connection is renewed: calls in flight go on, further ones are made on another
            connection, which may lead to another worker process. None takes 60 s where there are several worker
            processes, else no limit.
        grpc_grace_s: how long calls may go on after that; those that take longer, streams above all, are cancelled.
            None sets no limit.
    """

    connections: Annotated[int, msgspec.Meta(ge=1)] = 8192
    body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 * 2**20
    grpc_bytes: Annotated[int, msgspec.Meta(ge=1)] = 16 * 2**20
    held_bytes: Annotated[int, msgspec.Meta(ge=1)] = 512 * 2**20
    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 32 * 2**10
    request_s: _Positive = 30.0
    idle_s: _Positive = 300.0
    picture_pixels: Annotated[int, msgspec.Meta(ge=1)] = 50_000_000
    ping_s: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    keepalive_s: _Positive | None = None
    grpc_age_s: _Positive | None = None
    grpc_grace_s: _Positive | None = None
