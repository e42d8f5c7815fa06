"""Options of `rushhour load` and `rushhour compare` on what is sent; and Ctrl-C, which keeps what was measured."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from rushhour.cli.command import option, options
from rushhour.cli.places import Named, Place
from rushhour.errors import LoadError

if TYPE_CHECKING:
    from rushhour.api import Stop

_ARRIVALS, _REQUESTS, _HTTP = "Arrivals", "Requests", "Any HTTP endpoint"

traffic_options = options(
    option("--arrivals", default="poisson", show_default=True, type=Named(), metavar="PROCESS", section=_ARRIVALS,
           help="poisson, constant, bursty (bursty:intensity=5,share=0.1,burst_s=0.5), or a file of recorded times."),
    option("--seed", type=click.IntRange(0, 2**53), metavar="N", section=_ARRIVALS,
           help="Seed of the arrivals. A fresh one by default."),
    option("--model", metavar="NAME", section=_REQUESTS,
           help="The model's name. Not needed where the server has only one."),
    option("--rows", default=1, show_default=True, type=click.IntRange(1, 65_536), metavar="N", section=_REQUESTS,
           help="Samples in one request."),
    option("--payloads", type=Place(), metavar="DIR", section=_REQUESTS,
           help="Send the samples of a bundle or run, or a folder's .npy, .npz, .json, .bin, .jpg, .png and .txt "
           "files. Random values by default."),
    option("--shape", "shapes", multiple=True, metavar="NAME:3,224,224", section=_REQUESTS,
           help="Shape of an input whose sizes the server's metadata leaves open: of one sample, or of the whole "
           "tensor where it has as many axes. NAME:FP32:3,224,224 gives the type too. May be repeated."),
    option("--json-tensors", is_flag=True, section=_REQUESTS, help="Send tensors as JSON numbers, not as raw bytes."),
    option("--named-rows", is_flag=True, section=_REQUESTS,
           help="Send rows of a table by their columns' names, which the server of its model has."),
    option("--check", is_flag=True, section=_REQUESTS,
           help="Compare each answer with the first one to the same request."),
    option("--body", type=Place(), metavar="FILE", section=_HTTP, help="Send this file."),
    option("--method", metavar="METHOD", section=_HTTP, help="POST, GET, ..."),
    option("--path", metavar="PATH", section=_HTTP, help="Path of the endpoint."),
    option("--header", "headers", multiple=True, metavar="'K: V'", section=_HTTP,
           help="A header to send. May be repeated."),
)  # fmt: skip


def how_to_continue(_: dict[str, Any]) -> str:
    """What to do after an interruption."""
    return "what was measured until then is shown; run it again for the rest"


@contextmanager
def stopping_early(stop: Stop) -> Iterator[None]:
    """Ctrl-C ends the window in flight early, and it is kept; between windows and the second time it is as usual.

    Raises:
        KeyboardInterrupt: if nothing was measured until then.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.request():
            return
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    except LoadError:
        if stop.is_requested:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
