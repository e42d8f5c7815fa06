"""Control messages: parsing, with a bound on their size."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from rushhour.errors import WireError

MAX_CONTROL_BYTES = 64 * 2**10
"""Of a message other than inference: it is parsed on the event loop."""


def parsed(request: Any, sent: bytes) -> Any:
    """A message of the class `request`. Raises a `WireError` if it is too large or not valid."""
    if len(sent) > MAX_CONTROL_BYTES:
        raise WireError(
            "the message is too large", f"the limit of this method is {MAX_CONTROL_BYTES} bytes", "send less"
        )
    try:
        return request.FromString(sent)
    except DecodeError as error:
        what = f"the message is not a valid {request.DESCRIPTOR.name}"
        raise WireError(what, str(error), "see the protocol's inference.proto") from error
