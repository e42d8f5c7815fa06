"""The candidates: every bundle on every engine that can run it, at every precision and policy worth a thought."""

from __future__ import annotations

import msgspec

from rushhour.bundle import Bundle
from rushhour.engines import EngineConfig
from rushhour.plan import EngineName, Policy, Precision

LARGEST_BATCH = 64
QUEUE_BOUND = 1024

ENGINE_NAMES: dict[EngineName, str] = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "torch"}
"""As their makers write them."""

_RUNS: dict[Precision, tuple[tuple[EngineName, Precision], ...]] = {
    "f32": (("openvino", "f32"), ("openvino", "bf16"), ("onnxruntime", "f32")),
    "bf16": (("openvino", "bf16"), ("openvino", "f32"), ("onnxruntime", "f32")),
    "int8": (("openvino", "int8"), ("onnxruntime", "int8")),
}


class Candidate(msgspec.Struct, frozen=True):
    """One way to serve.

    Attributes:
        bundle: its role in the run: `reference`, `int8`. A folder of that name lies in `bundles/`.
        content: the first digits of the bundle's graph's SHA-256: a measurement is of these bytes and no others.
    """

    bundle: str
    content: str
    engine: EngineName
    precision: Precision
    policy: Policy

    @property
    def artefact(self) -> str:
        """The bundle as this engine compiles it: what decides accuracy."""
        return f"{self.bundle}@{self.content}/{self.engine}/{self.precision}"

    @property
    def compiled(self) -> str:
        """With all streams, of however many cells, and their threads: what decides service times."""
        return f"{self.artefact}/s{self.streams}t{self.policy.threads}"

    @property
    def streams(self) -> int:
        """Batches at the same time, over all cells."""
        return self.policy.cells * self.policy.streams

    def __str__(self) -> str:
        cells = f"c{self.policy.cells}" if self.policy.cells > 1 else ""
        return f"{self.artefact}/{cells}s{self.policy.streams}t{self.policy.threads}b{self.policy.max_batch}"

    @property
    def name(self) -> str:
        """For people: `int8 on OpenVINO, 2 streams`."""
        what = self.precision if self.bundle in ("reference", self.precision) else f"{self.bundle} in {self.precision}"
        cells, streams, threads = self.policy.cells, self.policy.streams, self.policy.threads
        layout = [f"{cells} processes"] if cells > 1 else []
        if streams > 1 or cells == 1:
            layout.append(f"{streams} streams" if streams > 1 else "1 stream")
        if threads > 1:
            layout.append(f"{threads} threads")
        batch = ", one sample at a time" if self.policy.max_batch == 1 else ""
        return f"{what} on {ENGINE_NAMES[self.engine]}, {' of '.join(layout)}{batch}"

    @property
    def layout(self) -> tuple[int, int, int]:
        """How it shares out the cores, which decides what serving costs: cells, streams of each, threads of each."""
        return self.policy.cells, self.policy.streams, self.policy.threads

    def spare(self, cores: int) -> int:
        """Of so many cores, those that its engine leaves alone."""
        return max(0, cores - self.streams * self.policy.threads)

    def engine_config(self) -> EngineConfig:
        """How one engine is opened that does what all its cells' engines do, to time and to judge it."""
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


def candidates(bundles: dict[str, Bundle], cores: int) -> list[Candidate]:
    """Each bundle x engine x precision x layout of the cores, at the largest batch bound; others follow by simulation.

    Args:
        bundles: role -> bundle.
        cores: to be shared out: all cores on one batch, one batch for each core, or one cell for each core.
    """
    layouts = sorted({(1, 1, cores), (1, cores, 1), (cores, 1, 1)})
    return [
        Candidate(
            bundle=role,
            content=_content(bundle),
            engine=engine,
            precision=precision,
            policy=Policy(cells, streams, threads, max_batch=LARGEST_BATCH, queue_bound=QUEUE_BOUND),
        )
        for role, bundle in bundles.items()
        for engine, precision in _RUNS[bundle.manifest.precision]
        for cells, streams, threads in layouts
    ]


def baseline(reference: Bundle, cores: int) -> Candidate | None:
    """What a user has today: the torch module, eager, one sample at a time; None where there is no torch module."""
    if reference.manifest.source is None or reference.manifest.precision != "f32":
        return None
    policy = Policy(streams=1, threads=cores, max_batch=1, queue_bound=QUEUE_BOUND)
    return Candidate("reference", _content(reference), "torch", "f32", policy)


def plain(reference: Bundle, cores: int) -> tuple[Candidate, ...]:
    """The reference compiled and nothing else, one sample at a time: as it is meant; then what may run where that does
    not, another engine before another precision."""
    policy = Policy(streams=1, threads=cores, max_batch=1, queue_bound=QUEUE_BOUND)
    meant = reference.manifest.precision
    runs = [run for run in _RUNS[meant] if run[1] in (meant, "f32")]
    return tuple(
        Candidate("reference", _content(reference), engine, precision, policy)
        for engine, precision in sorted(runs, key=lambda run: run[1] != meant)
    )


def _content(bundle: Bundle) -> str:
    return bundle.manifest.files["model.onnx"].sha256[:8]
