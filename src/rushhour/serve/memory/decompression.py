"""Decompression of request bodies, with a bound on the result."""

from __future__ import annotations

import zlib

import numpy as np

from rushhour.errors import WireError
from rushhour.wire.pieces import pause

_PACKED_BYTES, _UNPACKED_BYTES = 64 * 2**10, 256 * 2**10
"""Decompressed in one go: bytes before and after."""
_MOST_UNPACKED = 1033
"""Bytes that one byte of deflate can become, at most."""


def inflate(body: bytes | bytearray | memoryview, encoding: bytes, limit: int) -> memoryview:
    """Decompress a body in `gzip` or `deflate`.

    Args:
        body: compressed.
        encoding: the `Content-Encoding`, lower case.
        limit: bytes of the result, at most; no more are ever produced.

    Raises:
        WireError: 415 for another encoding, 413 beyond the limit, 400 for damaged data.
    """
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise WireError(
            f"the body is compressed with {encoding[:40].decode('latin-1')}",
            "this server reads gzip and deflate",
            "use one of them, or none",
            status=415,
        )
    try:
        stream = zlib.decompressobj(wbits=15 if encoding == b"deflate" else 31)
        content = np.empty(min(limit, len(body) * _MOST_UNPACKED), np.uint8).data  # takes memory as it is filled
        packed = memoryview(body)
        left: bytes | memoryview = b""
        at = size = 0
        while not stream.eof:
            if not left:
                left = packed[at : at + _PACKED_BYTES]
                at += len(left)
            part = stream.decompress(left, _UNPACKED_BYTES)
            if size + len(part) > limit:
                why = f"the limit is {limit} bytes after decompression"
                raise WireError("the body is too large", why, "split it", status=413)
            if not (part or left or stream.eof):
                raise zlib.error("it ends too early")
            content[size : size + len(part)] = part
            size += len(part)
            left = stream.unconsumed_tail
            if size > _UNPACKED_BYTES:
                pause()
        if stream.unused_data or at < len(packed):
            raise zlib.error("data follows its end")
    except zlib.error as error:
        raise WireError(f"the {encoding.decode()} body is damaged", str(error), "compress it again") from error
    return content[:size]
