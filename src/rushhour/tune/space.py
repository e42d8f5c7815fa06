"""The search space: every bundle on every engine that can run it, at every useful precision and policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle, own_sizes
from rushhour.capacity import best_bounds
from rushhour.cascade import CascadeRule
from rushhour.engines import EngineConfig
from rushhour.models import code_of
from rushhour.plan import EngineName, Policy, Precision

LARGEST_BATCH = 64
QUEUE_BOUND = 1024
_BUCKETS = 8
"""Of samples that differ in length: with more, batches of one of them grow rare."""

ENGINE_NAMES: dict[EngineName, str] = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "torch"}
"""For people."""

_RUNS: dict[Precision, tuple[tuple[EngineName, Precision], ...]] = {
    "f32": (("openvino", "f32"), ("openvino", "bf16"), ("onnxruntime", "f32")),
    "bf16": (("openvino", "bf16"), ("openvino", "f32"), ("onnxruntime", "f32")),
    "int8": (("openvino", "int8"), ("onnxruntime", "int8")),
}


class Candidate(msgspec.Struct, frozen=True):
    """One way to serve.

    Attributes:
        bundle: its role in the run: `reference`, `int8`, `prune-0.5-int8`. A folder of that name lies in `bundles/`.
        content: the first digits of the SHA-256 of the bundle's graph: a measurement holds for these bytes only.
    """

    bundle: str
    content: str
    engine: EngineName
    precision: Precision
    policy: Policy

    @property
    def artefact(self) -> str:
        """Names the bundle as this engine compiles it, which determines accuracy."""
        return f"{self.bundle}@{self.content}/{self.engine}/{self.precision}"

    @property
    def compiled(self) -> str:
        """Names the artefact with the streams of all cells and their threads, which determine service times."""
        return f"{self.artefact}/s{self.streams}t{self.policy.threads}"

    @property
    def streams(self) -> int:
        """Batches at the same time, of all cells together."""
        return self.policy.cells * self.policy.streams

    def __str__(self) -> str:
        cells = f"c{self.policy.cells}" if self.policy.cells > 1 else ""
        return f"{self.artefact}/{cells}s{self.policy.streams}t{self.policy.threads}b{self.policy.max_batch}"

    @property
    def name(self) -> str:
        """For people: `int8 on OpenVINO, 2 streams`."""
        return f"{self.network}, {self.layout_words}"

    @property
    def network(self) -> str:
        """For people: what runs on which engine, `int8 on OpenVINO`."""
        network = self.bundle.removesuffix(f"-{self.precision}")
        what = self.precision if network in ("reference", self.precision) else f"{network} in {self.precision}"
        return f"{what} on {ENGINE_NAMES[self.engine]}"

    @property
    def layout_words(self) -> str:
        """For people: how it uses the cores, `2 streams of 4 threads`."""
        cells, streams, threads = self.policy.cells, self.policy.streams, self.policy.threads
        layout = [f"{cells} processes"] if cells > 1 else []
        if streams > 1 or cells == 1:
            layout.append(f"{streams} streams" if streams > 1 else "1 stream")
        if threads > 1:
            layout.append(f"{threads} threads")
        batch = ", one sample at a time" if self.policy.max_batch == 1 else ""
        return f"{' of '.join(layout)}{batch}"

    @property
    def layout(self) -> tuple[int, int, int]:
        """Cells, streams of each, threads of each: the layout of the cores determines the overhead of serving."""
        return self.policy.cells, self.policy.streams, self.policy.threads

    def spare(self, cores: int) -> int:
        """The number of `cores` that its engine does not use."""
        return max(0, cores - self.streams * self.policy.threads)

    def engine_config(self) -> EngineConfig:
        """One engine with the streams of all cells, to time it and measure its accuracy."""
        return EngineConfig(
            engine=self.engine,
            precision=self.precision,
            streams=self.streams,
            threads=self.policy.threads,
            max_batch=self.policy.max_batch,
        )

    def with_batch(self, max_batch: int) -> Candidate:
        """The same with another bound on the batch."""
        return msgspec.structs.replace(self, policy=msgspec.structs.replace(self.policy, max_batch=max_batch))

    def with_layout(self, cells: int, streams: int, threads: int | None = None) -> Candidate:
        """The same in another layout of the cores; with as many threads as before where none are given."""
        threads = self.policy.threads if threads is None else threads
        policy = msgspec.structs.replace(self.policy, cells=cells, streams=streams, threads=threads)
        return msgspec.structs.replace(self, policy=policy)


class CascadeCandidate(Candidate, frozen=True):
    """Two artefacts as a cascade. The fields of `Candidate` are those of the large one; the policy is that of both.

    Attributes:
        small: the other one, in the same layout.
        small_hash: the content hash of its bundle.
        rule: which answers of the small one are kept.
    """

    small: Candidate
    small_hash: str
    rule: CascadeRule

    @property
    def artefact(self) -> str:
        """Names both artefacts and the rule between them."""
        step = self.rule.steps[0]
        return f"{self.small.artefact}>{step.score}{step.threshold:.6g}t{step.temperature:g}>{super().artefact}"

    @property
    def network(self) -> str:
        """For people: both, in order."""
        return f"cascade of {self.small.network} and {super().network}"


def candidates(bundles: dict[str, Bundle], cores: int, lengths: Sequence[int] = ()) -> list[Candidate]:
    """Each bundle x engine x precision x basic layout, at the largest batch bound; others follow by simulation.

    Args:
        bundles: role -> bundle.
        cores: of the machine; the layouts are `basic_layouts`.
        lengths: of the data's samples in the dimension in which they are padded, where there is one: they decide the
            buckets. Those of the bundle's own samples by default.
    """
    return [
        Candidate(
            bundle=role,
            content=_content(bundle),
            engine=engine,
            precision=precision,
            policy=Policy(
                *(cells, streams, threads),
                max_batch=LARGEST_BATCH,
                queue_bound=QUEUE_BOUND,
                buckets=_buckets(bundle, lengths),
            ),
        )
        for role, bundle in bundles.items()
        for engine, precision in _RUNS[bundle.manifest.precision]
        for cells, streams, threads in basic_layouts(cores)
    ]


def padded_lengths(bundle: Bundle, samples: NDArray[Any]) -> list[int]:
    """The lengths of samples in the dimension in which they are padded; empty where there is none.

    Args:
        bundle: that takes them.
        samples: `(n, *shape)`, or a structured array with a field for each of several inputs.
    """
    signature = bundle.manifest.signature
    if signature.padded is None:
        return []
    names = samples.dtype.names
    columns = {name: samples[name] for name in names} if names else {signature.inputs[0].name: samples}
    return [sizes[signature.padded] for sizes in own_sizes(signature, columns)]


def _buckets(bundle: Bundle, lengths: Sequence[int]) -> tuple[int, ...] | msgspec.UnsetType:
    signature = bundle.manifest.signature
    if signature.padded is None:
        return msgspec.UNSET
    at = signature.padded
    return best_bounds(lengths or [sizes[at] for sizes in bundle.sizes()], signature.dimensions[at].largest, _BUCKETS)


def other_layouts(candidate: Candidate, cores: int) -> list[Candidate]:
    """The same artefact in all other layouts that fit the cores, those with the same service times together.

    Args:
        candidate: in a basic layout.
        cores: of the machine.
    """
    bare = candidate.with_batch(LARGEST_BATCH)
    return [bare.with_layout(*layout) for layout in all_layouts(cores) if layout not in basic_layouts(cores)]


def all_layouts(cores: int) -> list[tuple[int, int, int]]:
    """Cells, streams of each, threads of each: all layouts that fit, those with the same service times together.

    Threads are a power of two, or all cores. The streams take all cores, or leave a quarter of them (at least one) to
    the rest of the server; each number of streams is divided into processes in every way that comes out even.
    """
    left = cores - max(1, cores // 4)
    threads = {cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)}
    engines = sorted({(whole // each, each) for each in threads for whole in (cores, left) if whole >= each})
    return [
        (cells, streams // cells, each)
        for streams, each in engines
        for cells in range(1, streams + 1)
        if streams % cells == 0
    ]


def basic_layouts(cores: int) -> list[tuple[int, int, int]]:
    """Cells, streams of each, threads of each: all cores on one batch, one batch per core, and one cell per core."""
    return sorted({(1, 1, cores), (1, cores, 1), (cores, 1, 1)})


def ways(precision: Precision) -> int:
    """Of engines and precisions in which a bundle of this precision runs."""
    return len(_RUNS[precision])


def baseline(reference: Bundle, cores: int) -> Candidate | None:
    """The baseline: the torch module, eager, one sample at a time; None where there is no torch module."""
    if reference.manifest.source is None or reference.manifest.precision != "f32":
        return None
    policy = Policy(streams=1, threads=cores, max_batch=1, queue_bound=QUEUE_BOUND)
    return Candidate("reference", _content(reference), "torch", "f32", policy)


def plain(reference: Bundle, cores: int) -> tuple[Candidate, ...]:
    """The reference compiled and otherwise unchanged, one sample at a time, in the order of preference: its own
    precision on each engine, then another precision."""
    policy = Policy(streams=1, threads=cores, max_batch=1, queue_bound=QUEUE_BOUND)
    own = reference.manifest.precision
    runs = [run for run in _RUNS[own] if run[1] in (own, "f32")]
    return tuple(
        Candidate("reference", _content(reference), engine, precision, policy)
        for engine, precision in sorted(runs, key=lambda run: run[1] != own)
    )


def torch_code(candidate: Candidate, bundle: Bundle, trusted: tuple[str, ...]) -> dict[str, str]:
    """Hashes of the torch module's code, where that is what runs: the code is not part of the bundle."""
    source = bundle.manifest.source
    return code_of(source, trusted) if candidate.engine == "torch" and source is not None else {}


def _content(bundle: Bundle) -> str:
    return bundle.manifest.files["model.onnx"].sha256[:8]
