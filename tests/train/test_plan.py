"""The planner: its layer table, that what it finds is the best there is, that it fits, and what it says."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch
from torch import nn

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import ModelError, PlanError
from rushhour.models import article, mlp
from rushhour.system import machine
from rushhour.testing.networks import ANY
from rushhour.train.parallel import Mode, ParallelPlan, plan_for
from rushhour.train.parallel.cost import Layout, Link, Mesh, boundary_cost, layer_cost, move_cost, state_bytes
from rushhour.train.parallel.layer_table import table_of
from rushhour.train.parallel.plan import LayerPlan
from rushhour.train.parallel.planner import plan_layers

FAR = msgspec.structs.replace(
    ANY,
    dense_flops=1e11,
    convolution_flops=1e11,
    bandwidth=2e10,
    reduce=Link(1e-6, 1e-8),
    exchange=Link(1e-6, 1e-8),
    send=Link(1e-6, 1e-8),
)
"""A machine whose wire is slow beside its processors."""
ARTICLE = Source("rushhour.models:article", {})
PICTURE = (TensorSpec("image", "uint8", (224, 224, 3)),)
GB = 10**9


def for_article(mode: Mode = "auto", workers: int = 8, memory_bytes: int | None = 16 * GB) -> ParallelPlan:
    return plan_for(
        ARTICLE, PICTURE, 1000, workers=workers, batch=64, mode=mode, memory_bytes=memory_bytes, constants=FAR
    )


def test_layer_table_of_the_article_s_network() -> None:
    with torch.device("meta"):
        table = table_of(article(), (3, 224, 224), 1000)
    assert sum(layer.parameters for layer in table) == 103_339_528
    assert state_bytes(table) == 16 * 103_339_528
    convolutions = [layer for layer in table if layer.kind == "convolution"]
    assert sum(layer.parameters for layer in convolutions) == 65_568
    assert sum(3 * layer.flops for layer in table) == pytest.approx(7.8e9, rel=0.05)
    dense = [layer for layer in table if layer.kind == "dense"]
    assert [(layer.in_width, layer.out_width) for layer in dense] == [(64 * 56 * 56, 512), (512, 1000)]
    assert dense[0].flops == 2 * 64 * 56 * 56 * 512


def test_the_article_s_network_is_cut_where_its_parameters_are() -> None:
    """The ring's bytes, and 40 times fewer; an eighth of the state on each of 8 workers."""
    chosen, replicas = for_article(), for_article("data")
    assert replicas.predicted.sent_bytes == pytest.approx(2 * 7 / 8 * 4 * 103_339_528)
    assert replicas.predicted.state_bytes == 16 * 103_339_528
    layouts = {layer.name: layer.layout for layer in chosen.layers}
    assert (layouts["0"], layouts["13"]) == ("data", "row")
    assert replicas.predicted.sent_bytes >= 40 * chosen.predicted.sent_bytes
    assert chosen.predicted.state_bytes <= 1.1 / 8 * replicas.predicted.state_bytes


WIDTHS = (40, 8, 64, 8, 16)


def dense_chain() -> tuple[nn.Sequential, tuple[int, ...]]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers), (WIDTHS[0],)


@pytest.mark.parametrize("beta", [1e-10, 1e-8, 1e-6])
@pytest.mark.parametrize("batch", [4, 64])
def test_layouts_are_the_best_of_all_there_are(beta: float, batch: int) -> None:
    """Against every combination of layouts, priced one by one with the same costs."""
    constants = msgspec.structs.replace(ANY, reduce=Link(1e-5, beta), exchange=Link(1e-6, beta))
    network, shape = dense_chain()
    table = table_of(network.to("meta"), shape)
    mesh = Mesh(1, 2, 1)

    def seconds(layouts: tuple[Layout, ...]) -> float:
        left = iter(layouts)
        total, features = 0.0, False
        for layer in table:
            layout: Layout = next(left) if layer.parameters else "local"
            total += layer_cost(layer, layout, mesh, batch, 1, constants).seconds
            if layer.kind == "elementwise":
                continue
            if features != (layout == "row"):
                total += move_cost(layer.inputs, mesh, batch, 1, constants).seconds
            features = layout == "column"
        if features:
            total += move_cost(table[-1].outputs, mesh, batch, 1, constants).seconds
        return total

    cuts: tuple[Layout, ...] = ("column", "row")
    best = min(seconds(layouts) for layouts in itertools.product(cuts, repeat=len(WIDTHS) - 1))
    plan = plan_layers(table, workers=2, batch=batch, mode="model", constants=constants)
    assert plan.predicted.step_s == pytest.approx(best)


def test_stages_are_the_most_even_there_are() -> None:
    network = nn.Sequential(*(nn.Linear(width, width) for width in (64, 64, 64, 64, 64, 64, 64)))
    table = list(table_of(network.to("meta"), (64,)))
    table[2] = msgspec.structs.replace(table[2], flops=table[2].flops * 1000)  # one that is worth all others
    args = (Mesh(1, 1, 3), 24, 3, ANY)

    def slowest(cuts: tuple[int, ...]) -> float:
        edges = (0, *cuts, len(table))
        times = []
        for start, end in itertools.pairwise(edges):
            time = sum(layer_cost(layer, "data", *args).seconds for layer in table[start:end])
            time += boundary_cost(64, *args).seconds * ((start > 0) + (end < len(table)))
            times.append(time)
        return max(times)

    plan = plan_layers(tuple(table), workers=3, batch=24, mode="pipeline", constants=ANY, microbatches=3)
    stages = [layer.stage for layer in plan.layers]
    cuts = tuple(index for index in range(1, len(table)) if stages[index] != stages[index - 1])
    every = list(itertools.combinations(range(1, len(table)), 2))
    assert slowest(cuts) == pytest.approx(min(slowest(two) for two in every))


def test_short_memory_makes_plans_smaller_and_slower_until_none_fits() -> None:
    with torch.device("meta"):
        table = table_of(mlp(inputs=256, outputs=10, hidden=1024, depth=8), (256,))

    def with_memory(memory: int) -> ParallelPlan:
        return plan_layers(table, workers=4, batch=4096, constants=ANY, memory_bytes=memory)

    free = with_memory(16 * GB)
    needed = free.predicted.memory_bytes
    tight = with_memory(int(0.6 * needed))
    assert tight.predicted.memory_bytes <= 0.6 * needed
    assert tight.predicted.step_s > free.predicted.step_s
    assert "more than the" in tight.explain()
    with pytest.raises(PlanError, match=r"no plan fits in memory: the smallest needs 0\.\d\d GB for each of 4 workers"):
        with_memory(10**6)
    with pytest.raises(PlanError, match=r"no data plan fits in memory.*or --parallel auto"):
        plan_layers(table, workers=4, batch=64, mode="data", constants=ANY, memory_bytes=10**6)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("pipeline", "it has 1 layers in sequence, fewer than 2 stages"),
        ("model", "no dense layer has 2 or more inputs and outputs"),
    ],
)
def test_a_network_in_one_piece_cannot_be_cut(mode: Mode, says: str) -> None:
    table = table_of(nn.Conv2d(1, 2, 3, device="meta"), (1, 8, 8))
    with pytest.raises(PlanError, match=says):
        plan_layers(table, workers=2, batch=4, mode=mode, constants=ANY)
    assert plan_layers(table, workers=2, batch=4, constants=ANY).mode in ("data", "sharded")


def test_every_stage_has_something_to_learn() -> None:
    """A worker without parameters has no optimizer, and would end the training of all."""
    with torch.device("meta"):
        table = table_of(mlp(inputs=16, outputs=10, hidden=8, depth=3), (16,))
    learning = sum(layer.parameters > 0 for layer in table)
    assert learning == 4 < len(table)
    for workers in (2, 3, 4):
        plan = plan_layers(table, workers=workers, batch=64, mode="pipeline", constants=ANY)
        learnt = [0] * workers
        for layer, planned in zip(table, plan.layers, strict=True):
            learnt[planned.stage] += layer.parameters
        assert all(learnt), plan.explain()
    with pytest.raises(PlanError, match="it has 4 layers that learn, fewer than 5 stages"):
        plan_layers(table, workers=5, batch=64, mode="pipeline", constants=ANY)


def test_a_plan_says_why_and_goes_through_json() -> None:
    plan = for_article()
    said = plan.explain()
    assert "layer 13: cut along its inputs" in said
    for mode in ("data", "sharded", "model", "hybrid"):
        assert f"{mode} (" in said
    assert "pipeline: not possible: it has 6 layers that learn, fewer than 8 stages" in said
    assert "pipeline (" in for_article(workers=4).explain()
    assert said.count("*") == 1
    assert msgspec.json.decode(msgspec.json.encode(plan), type=ParallelPlan) == plan
    assert plan.simulated  # its constants are of two workers
    assert "simulated" in said


def test_more_workers_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert "warning: 8 workers share 2 cores" in for_article().explain()
    assert "warning" not in for_article(workers=2).explain()


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="batches of 0"):
        plan_for(ARTICLE, PICTURE, 1000, workers=2, batch=0, constants=ANY)
    with pytest.raises(ModelError, match=r"answers with shape \(1000,\), the task has 7 outputs|7 outputs"):
        plan_for(ARTICLE, PICTURE, 7, workers=2, batch=4, constants=ANY)
    with pytest.raises(PlanError, match="does not give each of 8 workers a sample"):
        plan_layers(table_of(mlp(4, 2, 8, 2).to("meta"), (4,)), workers=8, batch=4, mode="data", constants=ANY)


def test_one_worker_has_nothing_to_divide() -> None:
    plan = for_article(workers=1)
    assert (plan.mode, plan.mesh) == ("data", Mesh(1, 1, 1))
    assert {layer.layout for layer in plan.layers} == {"data", "local"}
    assert all(isinstance(layer, LayerPlan) and layer.stage == 0 for layer in plan.layers)
    assert "nothing is divided" in plan.explain()
