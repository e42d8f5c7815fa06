"""Every plan trains as one process does, sends what it says, and keeps what it says."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch

from rushhour.errors import PlanError
from rushhour.testing.networks import (
    ANY,
    CLASSES,
    SMALL,
    WIDE,
    Trained,
    all_of,
    arranged,
    distance,
    short_training,
    sum_of_losses,
    table_for,
)
from rushhour.train.parallel import Mode, ParallelPlan, launch
from rushhour.train.parallel.cost import Layout, Mesh
from rushhour.train.parallel.planner import plan_layers

pytestmark = pytest.mark.timeout(600)
"""Four workers on two slow cores, beside another test, need more than three minutes for all that is looked at here."""

BATCH = 11


def planned(name: str, workers: int, mode: Mode, **options: object) -> ParallelPlan:
    return plan_layers(table_for(name), workers=workers, batch=BATCH, mode=mode, constants=ANY, **options)  # type: ignore[arg-type]


def by_hand(
    name: str, mesh: Mesh, dense: Layout = "data", rest: Layout = "data", microbatches: int = 1
) -> ParallelPlan:
    return arranged(
        table_for(name), mesh, batch=BATCH, constants=ANY, dense=dense, rest=rest, microbatches=microbatches
    )


def cases(workers: int) -> dict[str, tuple[str, ParallelPlan, dict[str, object]]]:
    found: dict[str, tuple[str, ParallelPlan, dict[str, object]]] = {}
    for name in SMALL:
        modes: tuple[Mode, ...] = ("data", "sharded", "tables", "model", "pipeline")
        for mode in modes:
            try:
                found[f"{name} {mode}"] = name, planned(name, workers, mode), {}
            except PlanError:
                assert mode in ("tables", "model", "pipeline"), "data and sharded are always possible"
        if workers == 4:
            m = 1 if name == "residual" else 2
            found[f"{name} 2x1x2"] = name, by_hand(name, Mesh(2, 1, 2), microbatches=m), {}
            found[f"{name} 1x2x2 column"] = name, by_hand(name, Mesh(1, 2, 2), "column", "sharded", m), {}
            found[f"{name} 2x2x1 row"] = name, by_hand(name, Mesh(2, 2, 1), "row", "sharded"), {}
    if workers == 4:
        found["recommender 2x1x2 tables"] = (
            "recommender",
            by_hand("recommender", Mesh(2, 1, 2), "data", "tables", 2),
            {},
        )
    found["recommender row, tables"] = "recommender", by_hand("recommender", Mesh(1, workers, 1), "row", "tables"), {}
    found["article row"] = "article", by_hand("article", Mesh(1, workers, 1), "row"), {}
    found["mlp column"] = "mlp", by_hand("mlp", Mesh(1, workers, 1), "column"), {}
    for name in ("article", "mlp"):
        found[f"{name} row float32"] = name, by_hand(name, Mesh(1, workers, 1), "row"), {"double": False}
        found[f"{name} data float32"] = name, planned(name, workers, "data"), {"double": False}
        found[f"{name} data sent"] = name, planned(name, workers, "data"), {"shared_memory": False}
    for name, layout in (("mlp", "row"), ("transformer", "sharded"), ("mlp", "data")):
        one = by_hand(name, Mesh(1, workers, 1), layout, layout if layout == "sharded" else "data")  # type: ignore[arg-type]
        found[f"{name} {layout} clipped"] = name, one, {"clip": 0.05}
    return found


@functools.cache
def launched(workers: int) -> dict[object, list[Trained]]:
    """Case -> what each worker came to. One launch for all tests of this file, because starting is slow."""
    found: dict[object, tuple[str, ParallelPlan, dict[str, object]]] = {**cases(workers), **sending_cases(workers)}
    if workers == 2:
        found |= {("local", mode): ("residual", plan, {"batch_norm": "local"}) for mode, plan in local_plans().items()}
    by_worker = launch(all_of, workers, (list(found.values()),))
    return {case: [one[index] for one in by_worker] for index, case in enumerate(found)}


@functools.cache
def alone(name: str, double: bool = True, clip: float | None = None, shared_memory: bool = True) -> Trained:
    plan = plan_layers(table_for(name), workers=1, batch=BATCH, constants=ANY)
    return short_training(name, plan, double=double, clip=clip, shared_memory=shared_memory)


LONG = [pytest.mark.slow, pytest.mark.long]
FOUR = pytest.param(4, marks=LONG)


@pytest.mark.parametrize(
    ("workers", "case"),
    [(2, case) for case in cases(2)] + [pytest.param(4, case, marks=LONG) for case in cases(4)],
)
def test_every_plan_trains_as_one_process(workers: int, case: str) -> None:
    name, _, how = cases(workers)[case]
    first, *others = launched(workers)[case]
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


def replicas_that_share_gradients(name: str, plan: ParallelPlan) -> dict[str, torch.Tensor]:
    """What DistributedDataParallel computes, in one process: each part of a batch normalised by itself."""
    torch.manual_seed(0)
    network = SMALL[name][0]().double().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    buffers = {key: one for key, one in network.named_buffers() if one.is_floating_point()}
    for _ in range(5):
        inputs = torch.randn(BATCH, *SMALL[name][1], generator=generator, dtype=torch.float64)
        targets = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        before = {key: one.clone() for key, one in buffers.items()}
        after: dict[str, list[torch.Tensor]] = {key: [] for key in buffers}
        for part in torch.arange(BATCH).tensor_split(plan.workers):
            for key, one in buffers.items():
                one.copy_(before[key])
            (sum_of_losses(network(inputs[part]), targets[part]) / BATCH).backward()
            for key, one in buffers.items():
                after[key].append(one.clone() * (len(part) / BATCH))
        for key, one in buffers.items():
            one.copy_(torch.stack(after[key]).sum(0))
        optimizer.step()
    return {key: one for key, one in network.state_dict().items() if "tracked" not in key}


def local_plans() -> dict[Mode, ParallelPlan]:
    return {mode: planned("residual", 2, mode) for mode in ("data", "sharded")}


def test_batch_normalisation_of_each_workers_rows_alone_is_that_of_replicas() -> None:
    name = "residual"
    for mode, plan in local_plans().items():
        trained = launched(2)["local", mode][0]
        got = {key: one for key, one in trained.state.items() if "tracked" not in key}
        want = {key: one.detach().numpy() for key, one in replicas_that_share_gradients(name, plan).items()}
        assert distance(got, want) <= 1e-10
        assert distance(trained.state, alone(name).state) > 1e-6, "it is not what one process does"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG if name in ("article", "residual") else ()) for name in SMALL]
)
def test_shared_state_is_a_kth_on_each_worker(name: str) -> None:
    kept = [one.state_bytes for one in launched(4)[f"{name} sharded"]]
    tensors = sum(1 for _ in SMALL[name][0]().parameters())
    # what does not divide by 4 leaves some workers one number more of a tensor, in four copies of 8 bytes
    assert max(kept) <= alone(name).state_bytes / 4 + tensors * 4 * 8
    assert sum(kept) == alone(name).state_bytes


WIRE_BATCH = 16


@functools.cache
def sending_cases(workers: int) -> dict[tuple[str, Mode], tuple[str, ParallelPlan, dict[str, object]]]:
    """Network and mode -> what to train, by messages alone."""
    found: dict[tuple[str, Mode], tuple[str, ParallelPlan, dict[str, object]]] = {}
    modes: tuple[Mode, ...] = ("data", "sharded", "tables", "model", "pipeline", "hybrid")
    how = {"double": False, "steps": 3, "wide": True, "shared_memory": False}
    for name in WIDE:
        for mode in modes:
            with contextlib.suppress(PlanError):
                plan = plan_layers(table_for(name, True), workers=workers, batch=WIRE_BATCH, mode=mode, constants=ANY)
                found[name, mode] = name, plan, how
    return found


def sending(workers: int) -> dict[tuple[str, Mode], tuple[ParallelPlan, list[Trained]]]:
    """Network and mode -> the plan, and what each worker came to."""
    return {key: (plan, launched(workers)[key]) for key, (_, plan, _) in sending_cases(workers).items()}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, FOUR])
@pytest.mark.parametrize("mode", ["data", "sharded", "tables", "model", "pipeline", "hybrid"])
def test_workers_send_and_keep_what_was_predicted(mode: Mode, workers: int) -> None:
    """Bytes from the kernel's count for each socket; state as it lies in memory."""
    seen = 0
    for (name, of), (plan, trained) in sending(workers).items():
        if of != mode:
            continue
        seen += 1
        most = max(one.sent_bytes for one in trained)
        # less, where the first layer is cut: nobody wants the gradient of a network's inputs
        assert 0.9 <= most / plan.predicted.sent_bytes <= 1.05, (name, plan.explain())
        assert max(one.state_bytes for one in trained) == pytest.approx(plan.predicted.state_bytes, rel=0.02), name
    assert seen


@pytest.mark.slow
def test_dense_layers_cut_by_rows_send_a_fraction_of_what_replicas_do() -> None:
    found = sending(4)
    sent = {mode: max(one.sent_bytes for one in found["article", mode][1]) for mode in ("data", "model")}
    assert sent["data"] > 4 * sent["model"]
