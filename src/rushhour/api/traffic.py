"""What a load sends: arrivals, and the requests for a server of models or for any HTTP endpoint."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Final, TypedDict

from rushhour.api.values import StrPath, read_path, read_texts
from rushhour.bundle import Bundle, suggest_bundle
from rushhour.errors import GoalError, LoadError
from rushhour.load import (
    Arrivals,
    Endpoint,
    Payload,
    Shape,
    Trace,
    body_payloads,
    discover,
    endpoint,
    folder_payloads,
    payloads,
    read_arrivals,
    read_bodies,
    read_shapes,
)
from rushhour.load.payload import Encoding, row_payloads
from rushhour.plan import SO_FAR
from rushhour.records.compression import COMPRESSION
from rushhour.records.curves import CURVES

_SEEDS: Final = 2**31
_LARGEST_SEED: Final = 2**53


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is sent, and how answers are judged.

    Attributes:
        arrivals: the arrival process.
        seed: of the arrivals.
        model: the model's name; None for a server's only one.
        rows: samples in one request.
        shapes: of inputs whose sizes the server's metadata leaves open.
        encoding: of tensors over HTTP.
        named_rows: send real rows that the server has, by their columns' names.
        payloads: a folder of files, or a bundle, whose samples are sent; None for random values.
        body: a file that is sent as it is, to any HTTP endpoint; `method`, `path` and `headers` likewise.
        check: compare each answer with the first one to the same request.
    """

    arrivals: Arrivals
    seed: int
    model: str | None = None
    rows: int = 1
    shapes: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
    encoding: Encoding = "binary"
    named_rows: bool = False
    payloads: Path | None = None
    body: Path | None = None
    method: str | None = None
    path: str | None = None
    headers: tuple[str, ...] = ()
    check: bool = False

    @property
    def is_plain_http(self) -> bool:
        """Whether any HTTP endpoint is meant, not a server of models."""
        return bool(self.body or self.method or self.path or self.headers)

    @property
    def is_random(self) -> bool:
        """Whether random values are sent."""
        return self.payloads is None and not (self.named_rows or self.is_plain_http)

    @property
    def arrivals_name(self) -> str:
        """The arrival process as a user writes it."""
        return getattr(self.arrivals, "__name__", str(self.arrivals))

    def aim(self, url: str) -> tuple[Endpoint, list[Payload]]:
        """The server at `url`, and the requests for it.

        Raises:
            LoadError: if the server cannot be reached, or options contradict each other.
            BundleError: if `payloads` is a damaged bundle.
        """
        if self.is_plain_http:
            at = endpoint(url)
            is_model = self.model is not None or bool(self.shapes) or self.named_rows
            if at.protocol == "grpc" or is_model or (self.body and self.payloads):
                raise LoadError(
                    f"cannot load {url} with these options",
                    "--body, --method, --path and --header are for plain HTTP, without --model and --shape, and --body "
                    "excludes --payloads",
                    "leave one of them out",
                )
            source = self.body or self.payloads
            bodies = read_bodies(source) if source is not None else []
            method = self.method or ("POST" if bodies else "GET")
            return at, body_payloads(at, bodies, method=method, path=self.path or "", headers=self.headers)
        bundle = None if self.payloads is None else _bundle_of(self.payloads)
        target = discover(url, self.model).shaped(self.shapes)
        if self.named_rows:
            named = dataclasses.replace(target, named_rows=True)
            return named, row_payloads(named, rows=self.rows, seed=self.seed)
        if self.payloads is None or bundle is not None:
            samples, signature = (None, None) if bundle is None else (bundle.samples(), bundle.manifest.signature)
            return target, payloads(
                target, samples, rows=self.rows, seed=self.seed, encoding=self.encoding, signature=signature
            )
        return target, folder_payloads(target, self.payloads, encoding=self.encoding)


class TrafficOptions(TypedDict, total=False):
    """The arguments of `load` and `compare` that say what is sent; see `load`."""

    arrivals: str | Arrivals
    seed: int | None
    model: str | None
    rows: int
    shapes: str | Sequence[str] | Mapping[str, Shape]
    json_tensors: bool
    named_rows: bool
    payloads: StrPath | None
    body: StrPath | None
    method: str | None
    path: str | None
    headers: str | Sequence[str]
    check: bool


def read_traffic(
    *,
    arrivals: str | Arrivals,
    seed: int | None,
    shapes: str | Sequence[str] | Mapping[str, Shape],
    json_tensors: bool,
    payloads: StrPath | None,
    body: StrPath | None,
    headers: str | Sequence[str],
    **rest: Any,
) -> Traffic:
    """The traffic that arguments of `load` and `compare` name; a fresh seed where none is given.

    Raises:
        LoadError: if the arrivals or a shape cannot be read.
        GoalError: if the seed cannot be used.
    """
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise GoalError(f"cannot use the seed {seed}", f"a seed is 0 to {_LARGEST_SEED}", "give another, or none")
    texts = [shapes] if isinstance(shapes, str) else shapes
    return Traffic(
        arrivals=read_arrivals(arrivals) if isinstance(arrivals, str) else arrivals,
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
        encoding="json" if json_tensors else "binary",
        headers=read_texts(headers),
        shapes=texts if isinstance(texts, Mapping) else read_shapes(texts),
        payloads=None if payloads is None else read_path(payloads),
        body=None if body is None else read_path(body),
        **rest,
    )


def read_rates(rates: float | str | Sequence[float | str], traffic: Traffic) -> list[float]:
    """Requests per second; `recorded` is a trace's own rate.

    Raises:
        GoalError: if there is none, one is not a number above 0, or there is no trace.
    """
    found = []
    for given in [rates] if isinstance(rates, str | int | float | Real) else rates:
        if given == "recorded":
            if not isinstance(traffic.arrivals, Trace):
                raise GoalError(
                    "there is no recorded rate", "the arrivals are not a trace", "use for example --rate 100"
                )
            found.append(traffic.arrivals.rate_rps)
            continue
        try:
            rate = float(given)
        except (ValueError, TypeError):
            rate = 0.0
        if not 0 < rate < float("inf"):
            raise GoalError(
                f"cannot send {given!r} requests per second",
                "a rate is a number above zero",
                "use for example --rate 100",
            )
        found.append(rate)
    if not found:
        raise GoalError("there is no rate", "the list is empty", "give one, or None to search for the capacity")
    return found


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle whose samples are to be sent: that at `path`, or of the run there; None for a folder of payloads.

    Raises:
        BundleError: if it is damaged.
        LoadError: if the folder is that of a training or compression: its files are no payloads.
    """
    run = path.parent if path.name in ("plan.json", SO_FAR) else path
    for folder in (path, run / "bundles" / "reference"):
        if (folder / "bundle.json").is_file():
            return Bundle.open(folder)
    if any((path / kept).is_file() for kept in (COMPRESSION, CURVES)):
        raise LoadError(
            f"{path} holds no payload", "it records how a bundle was made", suggest_bundle(path) or "name a bundle"
        )
    return None
