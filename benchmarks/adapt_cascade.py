"""Part 2 of bench-adapt: what a cascade of two variants carries, against the best single plan within the same budget.

The tuner searches both. Then the best pair by its prediction is served, whether or not the tuner chose it, and its
capacity and that of the best single plan are measured in turn, on samples of the test part. Where it carries no more,
the record says why: which share of the samples goes on, and what a sample costs on the small variant.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from bench.contest import Start, capacities_in_turn, served_plan
from bench.networks import quantised, trained
from bench.parts import Part, say
from bench.record import Check, Table, commit, judged, verdict
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing, TensorSpec
from rushhour.cascade import CascadeRule
from rushhour.cli.terminal import TerminalProgress
from rushhour.clock import WallClock
from rushhour.compress import named_inputs
from rushhour.data import Dataset, load
from rushhour.data.text_tables import load_text_table
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Accuracy
from rushhour.plan import PLAN, Plan, Trial
from rushhour.progress import Silent
from rushhour.records.journal import JOURNAL, Journal
from rushhour.train import TrainSettings
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.cascades import Cascades, Pair
from rushhour.tune.decisions import Decisions
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.prediction import Predictor
from rushhour.tune.search import tune
from rushhour.tune.server import plan_of
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate, plain
from rushhour.tune.state import CandidateState
from rushhour.tune.thresholds import choose_threshold

SEED = 0
CASCADE = "cascade.json"
"""The plan of the best pair, beside the run's own."""
_TRUSTED = ("rushhour.models:build",)
_GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%"))
_TEXT_GOAL = Goal(SLO.parse("p99<150ms"), AccuracyBudget.parse("2%"))
"""Of film reviews: a thousand of them can hardly show that a drop is within 1%, however small it is."""
_SENT = 512
"""Samples of the test part that are sent."""
_LANGUAGE = Path(__file__).resolve().parent.parent / "examples" / "language"
_TARGET = ">= 1.3"
_EPOCHS, _BATCH = 8, 256
"""Of the linear classifiers."""
_WORD_DECAY = 0.1
"""Of the weights of words, most of which are rare."""


class Tuned(NamedTuple):
    """A finished run with its pairs of variants."""

    run: Path
    plan: Plan
    winner: CandidateState
    cascades: Cascades
    reference: Candidate


def fashion_part(
    network: str, data_name: str, epochs: int, budget_s: float, rounds: int, resamples: int, work: Path
) -> Part:
    """Part 2: the article's network on Fashion-MNIST.

    Args:
        network: that is tuned.
        data_name: as on the command line.
        epochs: of its training.
        budget_s: of the tuning run.
        rounds: capacities of each contestant.
        resamples: on which a threshold is tried.
        work: where networks and runs are kept.
    """
    data = load(data_name)
    reference = trained(network, data, epochs, work / "machines")
    run = _fresh(work / "adapt" / "cascade")
    settings = TuneSettings(seed=SEED, budget_s=budget_s, cascade=True)
    tune_run(
        *(reference, data, _GOAL),
        run=run,
        training=TrainSettings(),
        settings=settings,
        progress=TerminalProgress(),
        trusted=_TRUSTED,
        cold=True,
    )
    return _part("2", f"the {network} network on {data.name}", run, data, rounds, resamples)


def plain_part(
    network: str, data_name: str, epochs: int, budget_s: float, rounds: int, resamples: int, work: Path
) -> Part:
    """Part 2.plain: the same network where it cannot be made smaller by training, as one that is imported, and a linear
    classifier of the pixels as the small one.

    Args:
        network, data_name, epochs, budget_s, rounds, resamples, work: as of `fashion_part`.
    """
    data = load(data_name)
    reference = trained(network, data, epochs, work / "machines")
    run = _fresh(work / "adapt" / "cascade-plain")
    bundles = {"reference": reference.copy_to(run / "bundles" / "reference")}
    bundles["reference-int8"] = quantised(reference, data, work / "machines").copy_to(
        run / "bundles" / "reference-int8"
    )
    bundles["linear"] = _linear(data, run / "bundles" / "linear")
    settings = TuneSettings(seed=SEED, budget_s=budget_s, recipes="none", cascade=True)
    plan = tune(bundles, data, _GOAL, run=run, settings=settings, progress=TerminalProgress(), trusted=_TRUSTED)
    plan.save(run / PLAN)
    what = f"the {network} network as it is and a linear classifier on {data.name}"
    return _part("2.plain", what, run, data, rounds, resamples)


def _linear(data: Dataset, path: Path) -> Bundle:
    """Multinomial logistic regression of the pixels."""
    import torch
    from torch import nn

    from rushhour.models import export

    torch.manual_seed(SEED)
    pixels = int(np.prod(data.sample_shape))
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, len(data.task.classes)))
    inputs = torch.from_numpy(data.train.inputs.reshape(len(data.train), -1)).float() / 255
    _fit(network, [inputs], data.train.targets, torch.optim.Adam(network.parameters(), 2e-3))
    return export(
        network.eval(),
        name="linear",
        task=data.task,
        sample_spec=TensorSpec("image", "uint8", data.sample_shape),
        preprocessing=Preprocessing(scale=1 / 255, layout="NHWC->NCHW"),
        source=None,
        lineage=(),
        samples=data.train.inputs[:16],
        path=path,
    )


def _fit(network: Any, inputs: list[Any], targets: NDArray[np.int64], optimizer: Any) -> None:
    """Train a small torch network on all samples at once in memory."""
    import torch
    from torch.nn import functional

    labels = torch.from_numpy(np.array(targets))
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(labels)), _BATCH):
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(*(each[rows] for each in inputs)), labels[rows])
            torch.autograd.backward(loss)
            optimizer.step()


def text_part(budget_s: float, rounds: int, resamples: int, work: Path) -> Part:
    """Part 2.text: film reviews, by MiniLM and by a linear classifier of their words (examples/language).

    Args:
        budget_s, rounds, resamples, work: as of `fashion_part`.
    """
    folder = work / "adapt" / "reviews"
    folder.mkdir(parents=True, exist_ok=True)
    table, network = folder / "reviews.csv", folder / "network"
    if not (network / "bundle.json").is_file():
        for command in (("reviews.py", table), ("train.py", table, network, "--rating", "rating")):
            subprocess.run([sys.executable, _LANGUAGE / command[0], *map(str, command[1:])], check=True)
    data, reference = load_text_table(table), Bundle.open(network)
    run = _fresh(work / "adapt" / "cascade-text")
    bundles = {"reference": reference.copy_to(run / "bundles" / "reference")}
    bundles["reference-int8"] = quantised(reference, data, folder).copy_to(run / "bundles" / "reference-int8")
    bundles["words"] = _words(data, reference, run / "bundles" / "words")
    settings = TuneSettings(seed=SEED, budget_s=budget_s, recipes="none", cascade=True)
    plan = tune(bundles, data, _TEXT_GOAL, run=run, settings=settings, progress=TerminalProgress(), trusted=_TRUSTED)
    plan.save(run / PLAN)
    what = "MiniLM and a linear classifier of words on film reviews"
    return _part("2.text", what, run, data, rounds, resamples, _TEXT_GOAL)


def _words(data: Dataset, reference: Bundle, path: Path) -> Bundle:
    """Multinomial logistic regression of how often each token occurs, up to a text's length."""
    import torch
    from torch import Tensor, nn

    from rushhour.models import export
    from rushhour.models.minilm import INPUTS, open_length, token_specs

    class Words(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.words = nn.Embedding(30_522, outputs)
            self.bias = nn.Parameter(torch.zeros(outputs))
            nn.init.zeros_(self.words.weight)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            counted = (attention_mask * (1 - token_type_ids)).to(torch.float32)[:, :, None]  # one segment: all zero
            words: Tensor = (self.words(input_ids) * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1).sqrt()
            return words + self.bias

    torch.manual_seed(SEED)
    network = Words(len(data.task.classes))
    inputs = [torch.from_numpy(data.train.inputs[name].copy()) for name in INPUTS]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=_WORD_DECAY)
    _fit(network, inputs, data.train.targets, optimizer)
    (longest,) = {dimension.largest for dimension in reference.manifest.signature.dimensions}
    dimensions, text = open_length(longest)
    return export(
        network.eval(),
        name="words",
        task=data.task,
        sample_spec=token_specs(longest),
        preprocessing=Preprocessing(),
        source=None,
        lineage=(),
        samples=data.train.inputs[:16][list(INPUTS)],
        path=path,
        dimensions=dimensions,
        text=text,
    )


def _fresh(run: Path) -> Path:
    """A run's folder, emptied where other code worked in it."""
    stamp = run.with_suffix(".json")
    if not stamp.is_file() or json.loads(stamp.read_text()) != commit():
        shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(commit()))
    return run


def _part(id: str, what: str, run: Path, data: Dataset, rounds: int, resamples: int, goal: Goal = _GOAL) -> Part:
    tuned = _opened(run, data, goal)
    pairs = tuned.cascades.predicted(tuned.winner, _states(tuned.plan, run)[0])
    columns = ("small", "large", "go on", "cost of a sample", "ideal", "predicted", "why not")
    rows = tuple(
        (pair.small.candidate.network, pair.large.candidate.network, _share(pair), pair.cost, _ideal(pair),
         pair.predicted, pair.why)
        for pair in pairs
    )  # fmt: skip
    note = (
        "Cost: of a sample on the small one over that on the large one. Ideal: 1 over cost plus the share that goes on."
    )
    table = Table(f"{what}: pairs of variants", columns, rows, note)
    pair = next((pair for pair in pairs if pair.threshold is not None and tuned.cascades.propose(pair)), None)
    title = f"{what}: capacity of the cascade over that of the best single plan"
    if pair is None:
        best = f"{tuned.winner.candidate.network}, predicted {tuned.winner.predicted or 0:,.0f}/s"
        why = "; ".join(pair.why for pair in pairs[:3]) or f"no variant is 1.5 times as fast as the best plan's: {best}"
        return Part((Check(f"{id}.capacity", title, "x", _TARGET, None, None, 0, False, why),), (table,), [])
    assert pair.state is not None
    assert pair.test is not None
    bundle = Bundle.open(run / "bundles" / pair.state.candidate.bundle)
    cascade = plan_of(pair.state.candidate, bundle, goal, tuned.plan.model)
    assert cascade.cascade is not None
    strict = msgspec.structs.replace(cascade.cascade, stands=False)  # no answer counts that the rule would not give
    msgspec.structs.replace(cascade, cascade=strict).save(run / CASCADE)
    single = Bundle.open(run / "bundles" / tuned.winner.candidate.bundle)
    plan_of(tuned.winner.candidate, single, goal, tuned.plan.model).save(run / "single.json")
    sent = named_inputs(single, data.test.inputs[:_SENT])
    starts: dict[str, Start] = {
        "cascade": lambda: served_plan(run, CASCADE, sent),
        "single": lambda: served_plan(run, "single.json", sent),
    }
    found = capacities_in_turn(starts, goal.slo, rounds, seed=SEED)
    ratios = [ours / theirs for ours, theirs in zip(found["cascade"], found["single"], strict=True)]
    chosen = "the cascade" if tuned.plan.cascade is not None else "one variant"
    share = _share(pair)
    limit = (
        f"a sample costs {pair.cost:.1%} on the small one of what it costs on the large one, so {_ideal(pair):.2f}x is "
        f"the most, without what a request costs outside the networks"
    )
    most = limit if share else "so the small one alone keeps the budget, and a cascade can only add to its cost"
    why = f"{share:.1%} go on, {most}; the tuner chose {chosen}"
    held, drops = _resampled(tuned, pair, data, resamples, goal.budget.max_drop)
    checks = (
        judged(f"{id}.capacity", title, _TARGET, ratios, why=why),
        verdict(f"{id}.drop", f"{what}: accuracy drop of the cascade on the test part, upper end of its interval",
                f"<= {100 * goal.budget.max_drop:g}", 100 * pair.test.drop_interval[1], None, pair.test.n,
                unit="points"),
        verdict(f"{id}.holds", f"{what}: resamples whose threshold keeps the budget on the half that chose nothing",
                ">= 0.95", held, None, resamples, unit=""),
    )  # fmt: skip
    capacities = tuple((name, statistics.median(each), min(each), max(each)) for name, each in found.items())
    measured = Table(f"{what}: capacities", ("plan", "median, /s", "lowest", "highest"), capacities)
    return Part(checks, (table, measured), {"capacities": found, "drops on other halves": drops})


def _share(pair: Pair) -> float:
    return 1.0 if pair.threshold is None else pair.threshold.escalated


def _ideal(pair: Pair) -> float:
    return 1 / (pair.cost + _share(pair))


def _opened(run: Path, data: Dataset, goal: Goal) -> Tuned:
    """The pairs of a finished run, from its journal: nothing is timed again."""
    plan = Plan.load(run / PLAN)
    bundles = {folder.name: Bundle.open(folder) for folder in sorted((run / "bundles").iterdir())}
    times = EngineTimes(Journal(run / JOURNAL), bundles, goal.slo, TuneSettings().time_s, _TRUSTED)
    reference, predictor = plain(bundles["reference"], 1)[0], Predictor(times)
    budget = Budget(None, WallClock())
    cascades = Cascades(bundles, data, goal, reference, predictor, None, budget, Decisions(), Silent(), _TRUSTED)
    return Tuned(run, plan, _states(plan, run)[1], cascades, reference)


def _states(plan: Plan, run: Path) -> tuple[list[CandidateState], CandidateState]:
    """The candidates of a run, and the best single one."""
    assert plan.evidence is not None
    states, best = [], None
    for trial in plan.evidence.trials:
        state = _state(trial) if (run / "bundles" / trial.bundle).is_dir() else None
        if state is None:
            continue
        states.append(state)
        if trial.fate == "won" or (plan.cascade is not None and trial.why.startswith("a cascade is faster")):
            best = state
    assert best is not None, "a run has a winner"
    return states, best


def _state(trial: Trial) -> CandidateState | None:
    if trial.accuracy is None or not trial.predicted_rps or ">" in trial.candidate or "@" not in trial.candidate:
        return None
    content = trial.candidate.partition("@")[2].partition("/")[0]
    candidate = Candidate(trial.bundle, content, trial.engine, trial.precision, trial.policy)
    state = CandidateState(candidate, predicted=trial.predicted_rps, capacity=trial.capacity_rps)
    value, drop = trial.accuracy, trial.accuracy_drop or 0.0
    within = trial.accuracy_drop_interval or (drop, drop)
    state.accuracy = Accuracy("accuracy", value, (value, value), 1, "validation", drop, within)
    return state


def _resampled(tuned: Tuned, pair: Pair, data: Dataset, resamples: int, max_drop: float) -> tuple[float, list[float]]:
    """How often a threshold that is chosen on one half of all held-out data keeps the budget on the other half.

    Returns:
        The share, and the drop on each other half, in points.
    """

    def pooled(candidate: Candidate) -> NDArray[Any]:
        return np.concatenate([tuned.cascades.outputs(candidate, part) for part in ("validation", "test")])

    small, large, reference = (pooled(each) for each in (pair.small.candidate, pair.large.candidate, tuned.reference))
    labels = np.concatenate([data.validation.targets, data.test.targets])
    assert pair.threshold is not None
    drops: list[float] = []
    for number in range(resamples):
        order = np.random.default_rng([SEED, number]).permutation(len(labels))
        ours, others = order[: len(order) // 2], order[len(order) // 2 :]
        found = choose_threshold(
            pair.threshold.step.variant, small[ours], large[ours], reference[ours], labels[ours],
            max_drop, logits=pair.logits,
        )  # fmt: skip
        if found is None:
            drops.append(0.0)  # nothing is served by such a threshold
            continue
        rule = CascadeRule((found.step,), "large", "output", pair.logits)
        answers, _ = rule.merged((small[others], large[others]))
        right = [(each.argmax(axis=1) == labels[others]).mean() for each in (reference[others], answers)]
        drops.append(100 * float(right[0] - right[1]))
    say(f"drops on other halves: {min(drops):.2f} to {max(drops):.2f} points")
    held = sum(drop <= 100 * max_drop for drop in drops)
    return held / resamples, drops
