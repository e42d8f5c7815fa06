"""Every plan trains as one process does, sends what it says, and keeps what it says."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import PlanError
from rushhour.testing.networks import CLASSES, SMALL, Trained, all_of, distance, short_training, sum_of_losses
from rushhour.train import launch
from rushhour.train.cost import Constants, Layer, Layout, Link, Mesh
from rushhour.train.plan import LayerPlan, Mode, ParallelPlan, plan_layers, table_of

CONSTANTS = Constants(
    workers=2,
    dense_flops=3e10,
    convolution_flops=4e10,
    bandwidth=5e9,
    operation_s=1e-5,
    solo=1.0,
    reduce=Link(1e-4, 1e-9),
    exchange=Link(1e-4, 1e-9),
    send=Link(1e-4, 1e-9),
)
FAR = msgspec.structs.replace(
    CONSTANTS,
    dense_flops=1e11,
    convolution_flops=1e11,
    bandwidth=2e10,
    reduce=Link(1e-6, 1e-8),
    exchange=Link(1e-6, 1e-8),
)
"""A machine whose wire is slow beside its processors."""
BATCH = 11
ARTICLE = Source("rushhour.models:article", {})
PICTURE = TensorSpec("image", "uint8", (224, 224, 3))


@functools.cache
def table(name: str) -> tuple[Layer, ...]:
    factory, shape = SMALL[name]
    with torch.device("meta"):
        return table_of(factory(), shape, CLASSES)


def planned(name: str, workers: int, mode: Mode, **options: object) -> ParallelPlan:
    return plan_layers(table(name), workers=workers, batch=BATCH, mode=mode, constants=CONSTANTS, **options)  # type: ignore[arg-type]


def arranged(
    name: str, mesh: Mesh, dense: Layout = "data", rest: Layout = "data", microbatches: int = 1
) -> ParallelPlan:
    """A plan made by hand: equal stages, one layout for the dense layers that can be cut and one for the others."""
    layers = table(name)
    each = -(-len(layers) // mesh.pipeline)
    plans = []
    for index, layer in enumerate(layers):
        cut = layer.kind == "dense" and min(layer.in_width, layer.out_width) >= mesh.tensor
        layout: Layout = (dense if cut else rest) if layer.parameters else "local"
        plans.append(LayerPlan(layer.name, layout, index // each))
    one = plan_layers(layers, workers=1, batch=BATCH, constants=CONSTANTS)
    return msgspec.structs.replace(
        one,
        workers=mesh.inner * mesh.pipeline,
        mesh=mesh,
        mode="hybrid",
        layers=tuple(plans),
        microbatches=microbatches,
    )


def cases(workers: int) -> dict[str, tuple[str, ParallelPlan, dict[str, object]]]:
    found: dict[str, tuple[str, ParallelPlan, dict[str, object]]] = {}
    for name in SMALL:
        modes: tuple[Mode, ...] = ("data", "sharded", "model", "pipeline")
        for mode in modes:
            try:
                found[f"{name} {mode}"] = name, planned(name, workers, mode), {}
            except PlanError:
                assert mode in ("model", "pipeline"), "data and sharded are always possible"
        if workers == 4:
            m = 1 if name == "residual" else 2
            found[f"{name} 2x1x2"] = name, arranged(name, Mesh(2, 1, 2), microbatches=m), {}
            found[f"{name} 1x2x2 column"] = name, arranged(name, Mesh(1, 2, 2), "column", "sharded", m), {}
            found[f"{name} 2x2x1 row"] = name, arranged(name, Mesh(2, 2, 1), "row", "sharded"), {}
    found["article row"] = "article", arranged("article", Mesh(1, workers, 1), "row"), {}
    found["mlp column"] = "mlp", arranged("mlp", Mesh(1, workers, 1), "column"), {}
    for name in ("article", "mlp"):
        found[f"{name} row float32"] = name, arranged(name, Mesh(1, workers, 1), "row"), {"double": False}
        found[f"{name} data float32"] = name, planned(name, workers, "data"), {"double": False}
    for name, layout in (("mlp", "row"), ("transformer", "sharded"), ("mlp", "data")):
        one = arranged(name, Mesh(1, workers, 1), layout, layout if layout == "sharded" else "data")  # type: ignore[arg-type]
        found[f"{name} {layout} clipped"] = name, one, {"clip": 0.05}
    return found


@functools.cache
def outcomes(workers: int) -> dict[str, list[Trained]]:
    """Case -> what each worker came to. One launch, because starting is slow."""
    found = cases(workers)
    by_worker = launch(all_of, workers, (list(found.values()),))
    return {case: [one[index] for one in by_worker] for index, case in enumerate(found)}


@functools.cache
def alone(name: str, double: bool = True, clip: float | None = None) -> Trained:
    plan = plan_layers(table(name), workers=1, batch=BATCH, constants=CONSTANTS)
    return short_training(name, plan, double=double, clip=clip)


@pytest.mark.parametrize(("workers", "case"), [(k, case) for k in (2, 4) for case in cases(k)])
def test_every_plan_trains_as_one_process(workers: int, case: str) -> None:
    name, _, how = cases(workers)[case]
    first, *others = outcomes(workers)[case]
    reference = alone(name, **how)  # type: ignore[arg-type]
    bound = 1e-10 if how.get("double", True) else 1e-5
    assert distance(first.state, reference.state) <= bound
    assert first.losses == pytest.approx(reference.losses, rel=bound)
    assert all(other.losses == first.losses for other in others)
    assert all(not other.state for other in others)


def test_one_worker_is_plain_torch() -> None:
    """Without dropout, whose masks are our own, nothing but torch's own operations is left: the same bits."""
    name = "residual"
    torch.manual_seed(0)
    network = SMALL[name][0]().double()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        inputs = torch.randn(BATCH, *SMALL[name][1], generator=generator, dtype=torch.float64)
        targets = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        (sum_of_losses(network(inputs), targets) * (1 / BATCH)).backward()
        optimizer.step()
    assert distance(alone(name).state, {key: value.numpy() for key, value in network.state_dict().items()}) == 0


@pytest.mark.parametrize("name", SMALL)
def test_shared_state_is_a_kth_on_each_worker(name: str) -> None:
    kept = [one.state_bytes for one in outcomes(4)[f"{name} sharded"]]
    tensors = sum(1 for _ in SMALL[name][0]().parameters())
    # what does not divide by 4 leaves some workers one number more of a tensor, in four copies of 8 bytes
    assert max(kept) <= alone(name).state_bytes / 4 + tensors * 4 * 8
    assert sum(kept) == alone(name).state_bytes
