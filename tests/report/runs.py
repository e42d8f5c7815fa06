"""Runs as the reports' tests need them: a plan with evidence, its journal, windows of load, and a page as read."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Accuracy, Measurement, Outcome, pack_latencies
from rushhour.plan import Certificate, Cut, Decision, Evidence, LadderStep, Plan, Policy, Trial, Variant
from rushhour.records.compression import Attempt, Compression, Confirmation, Factor, Stage
from rushhour.records.journal import Journal
from rushhour.report import SummaryTable
from rushhour.system.machine import describe

SLO_50 = SLO(percentile=99, limit_s=0.05)
BASELINE, WINNER = "reference/torch/f32/s1t2b1", "int8/openvino/int8/s2t1b32"
CAPACITIES = {
    BASELINE: 388.0,
    "reference/onnxruntime/f32/s1t2b8": 1420.0,
    "reference/openvino/f32/s1t2b1": 962.0,
    "reference/openvino/bf16/s2t1b16": 3610.0,
    WINNER: 9120.0,
    "int8/openvino/int8/s1t2b16": 7985.0,
}


def load(candidate: str, rate: float, seed: int, n: int = 6000, capacity: float | None = None) -> Measurement:
    """A window of load as a server with this capacity would answer it."""
    capacity = capacity or CAPACITIES[candidate]
    random = np.random.default_rng(seed)
    busy = rate / (capacity * 1.035)
    service = 0.0063 if candidate == BASELINE else 0.0011
    wait = 0.0095 * busy / max(0.05, 1.045 - busy) * random.exponential(0.45, n)
    seconds = service * random.lognormal(0, 0.18, n) + wait * (0.13 if candidate == BASELINE else 0.17)
    late = int((seconds > SLO_50.limit_s).sum())
    unstable, few = busy > 1.15, n < 299
    p50, low, p99, high = (float(np.quantile(seconds, q)) * 1e3 for q in (0.5, 0.9872, 0.99, 0.9925))
    passed = late / n < 0.009 and not unstable and not few
    outcome = Outcome.UNSTABLE if unstable else Outcome.PASS if passed else Outcome.FAIL
    return Measurement(
        slo=SLO_50,
        rate_rps=rate,
        seed=seed,
        duration_s=n / rate,
        n=n,
        late=late,
        errors=0,
        shed=0,
        p50_ms=p50,
        p99_ms=None if unstable or few else p99,
        p99_interval_ms=None if unstable or few else (low, high),
        goodput_rps=rate * (1 - late / n),
        generator_cpu=0.31,
        send_delay_p99_ms=0.4,
        outcome=outcome,
        reason=f"{late} of {n} late; 1% may be",
        latencies=pack_latencies(seconds),
    )


def trial(candidate: str, fate: str, predicted: float | None, drop: float | None, why: str) -> Trial:
    bundle, engine, precision, policy = candidate.split("/")[:4]
    found = re.fullmatch(r"s(\d+)t(\d+)b(\d+)", policy)
    assert found is not None
    streams, threads, batch = (int(value) for value in found.groups())
    return msgspec.convert(
        {
            "candidate": candidate,
            "bundle": bundle,
            "engine": engine,
            "precision": precision,
            "policy": {"streams": streams, "threads": threads, "max_batch": batch},
            "accuracy": None if drop is None else 0.9094 - drop,
            "accuracy_drop": drop,
            "accuracy_drop_interval": None if drop is None else (drop - 0.0031, drop + 0.0033),
            "predicted_rps": predicted,
            "capacity_rps": CAPACITIES.get(candidate),
            "p99_ms": None if candidate not in CAPACITIES else 41.0,
            "fate": fate,
            "why": why,
        },
        type=Trial,
    )


TRIALS = (
    trial(BASELINE, "baseline", None, 0.0, "the untouched model, one sample at a time"),
    trial("reference/onnxruntime/f32/s1t2b8", "beaten", 1500.0, 0.0, "1,420/s against 9,120/s"),
    trial("reference/openvino/f32/s1t2b1", "beaten", 1010.0, 0.0, "962/s against 9,120/s"),
    trial("reference/openvino/bf16/s2t1b16", "beaten", 3720.0, 0.0004, "3,610/s against 9,120/s"),
    trial("int8/openvino/int8/s1t2b16", "beaten", 8420.0, 0.0042, "7,985/s against 9,120/s in 6 paired blocks"),
    trial(WINNER, "won", 9480.0, 0.0042, "the highest confirmed rate inside both limits"),
    trial("int8/openvino/int8/s4t1b64", "dominated", 6100.0, 0.0042, "predicted 6,100/s, below 9,480/s"),
    trial("reference/openvino/f32/s2t1b8", "dominated", 1800.0, 0.0, "predicted 1,800/s, below 9,480/s"),
    trial("pruned/openvino/int8/s2t1b32", "over budget", 14200.0, 0.0217, "drop 1.86 to 2.50 points, 1 allowed"),
    trial("collapsed/openvino/int8/s2t1b32", "over budget", 15000.0, 0.81, "drop 81 points, 1 allowed"),
    trial("int8/onnxruntime/int8/s1t2b8", "failed", None, None, "onnxruntime has no kernel for QLinearConv here"),
)


CERTIFICATE = Certificate(
    statement="In 27 load tests of 4,320 plans: within 4% of the best at 95%",
    plans=4320,
    networks=9,
    simulated=1440,
    measured=11,
    load_tests=27,
    cuts=(
        Cut("shape", "dominated", "it removes more than another network and is predicted no faster", 1440, 3),
        Cut("train", "over budget", "its accuracy drop is not within the budget after distillation", 960, 2),
        Cut("train", "skipped", "no time was left to time or train it", 480, 1),
        Cut("simulate", "dominated", "another batch bound of the candidate is as good", 1320, 120),
        Cut("accuracy", "over budget", "its accuracy drop is not shown within the budget", 33, 33),
        Cut("predict", "dominated", "predicted too far below the best", 83, 83),
        Cut("race", "tied", "no significant difference under load, and a lower estimate", 1, 1),
        Cut("race", "beaten", "a lower throughput under load, or not proven on fresh seeds", 2, 2),
    ),
    covered=1044,
    expected_regret=0.0121,
    regret_bound=0.0386,
    confidence=0.95,
    sigma=0.0624,
    residuals=7,
    not_covered=("480 plans of 1 network not known to be within the accuracy budget: no time was left",),
)
DECISIONS = (
    Decision("shape", "3 shapes predicted, prune-0.5 2,100/s", "prune-0.5 may be trained", "it has to be faster", 42.4),
    Decision("time", "120 candidates timed", "118 go on", "the smallest bound within 2% of the best", 61.0),
    Decision("race", "int8 answers 1.21x (1.15 to 1.28)", "int8 on OpenVINO leads", "significantly more", 24.2, 1),
    Decision("confirm", "9 windows of load in all", "9,120/s proven", "a pass on fresh seeds", 250.0, 1),
)


def make_plan(**changes: object) -> Plan:
    evidence = Evidence(
        capacity_rps=CAPACITIES[WINNER],
        lowest_failing_rps=9394.0,
        p99_ms=None,
        p99_interval_ms=None,
        metric="accuracy",
        accuracy=0.9052,
        accuracy_interval=(0.8993, 0.9108),
        accuracy_drop=0.0042,
        accuracy_drop_interval=(0.0011, 0.0075),
        reference_accuracy=0.9094,
        reference_accuracy_interval=(0.9036, 0.9149),
        baseline_capacity_rps=CAPACITIES[BASELINE],
        baseline_p99_ms=None,
        parameters=2_791_754,
        model_bytes=2_903_312,
        reference_parameters=2_791_754,
        reference_model_bytes=11_180_405,
        machine=describe(),
        at="2026-03-14T09:26:53+00:00",
        trials=TRIALS,
        ladder=(
            LadderStep("as it is", BASELINE, 388.0, None, 0.9094),
            LadderStep("compiled", "reference/openvino/f32/s1t2b1", 962.0, None, 0.9094),
            LadderStep("batched", "reference/openvino/bf16/s2t1b16", 3610.0, None, 0.909),
            LadderStep("quantised", WINNER, 9120.0, None, 0.9052),
        ),
    )
    proofs = {name: load(name, CAPACITIES[name], 101) for name in CAPACITIES}
    evidence = msgspec.structs.replace(
        evidence,
        p99_ms=proofs[WINNER].p99_ms,
        p99_interval_ms=proofs[WINNER].p99_interval_ms,
        baseline_p99_ms=proofs[BASELINE].p99_ms,
        trials=tuple(
            msgspec.structs.replace(each, p99_ms=proofs[each.candidate].p99_ms) if each.candidate in proofs else each
            for each in evidence.trials
        ),
        ladder=tuple(msgspec.structs.replace(rung, p99_ms=proofs[rung.candidate].p99_ms) for rung in evidence.ladder),
    )
    plan = Plan(
        goal=Goal(slo=SLO_50, budget=AccuracyBudget(max_drop=0.01)),
        variants=(Variant("int8", "bundles/int8", "ab" * 32, "openvino", "int8"),),
        policy=Policy(streams=2, threads=1, max_batch=32),
        evidence=evidence,
    )
    own = set(Plan.__struct_fields__) - set(Evidence.__struct_fields__)
    fields = {key: value for key, value in changes.items() if key in own}
    plan = msgspec.structs.replace(plan, **fields)
    inner = {key: value for key, value in changes.items() if key not in fields}
    return msgspec.structs.replace(plan, evidence=msgspec.structs.replace(evidence, **inner)) if inner else plan


def make_run(folder: Path, plan: Plan | None = None) -> Path:
    (plan or make_plan()).save(folder / "plan.json")
    journal = Journal(folder / "measurements.jsonl")
    accuracy = Accuracy("accuracy", 0.9052, (0.8993, 0.9108), 10_000, "validation", 0.0042, (0.0011, 0.0075))
    journal.measure("accuracy", "int8/openvino/int8", "validation", Accuracy, lambda: accuracy)
    for candidate, capacity in CAPACITIES.items():
        for index, share in enumerate((0.5, 0.625, 0.78, 0.98, 1.22, 1.1, 1.03)):
            window = load(candidate, round(capacity * share, 1), 11 + index)
            detail = f"{window.rate_rps:g}/{window.seed}"
            journal.measure("search", candidate, detail, Measurement, lambda window=window: window)
        for seed in (101, 102, 103):
            window = load(candidate, capacity, seed)
            journal.measure("confirm", candidate, f"{capacity:g}/{seed}", Measurement, lambda window=window: window)
    few = load(WINNER, 4000.0, 7, n=200)
    journal.measure("probe", WINNER, "4000/7", Measurement, lambda: few)
    return folder


ESTIMATE: dict[str, object] = {
    "proven": False,
    "capacity_rps": 8930.0,
    "capacity_interval_rps": (8410.0, 9120.0),
    "p99_ms": None,
}


def judged(rate: float, outcome: Outcome, late: int = 0) -> Measurement:
    return msgspec.structs.replace(load(WINNER, rate, 1), outcome=outcome, late=late)


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, the ids and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def compressed(best: tuple[int, int] | None) -> Compression:
    """Three recipes: of one step, of two, and one that was not finished; two steps came out alike."""

    def stage(step: str, value: float, times: float) -> Stage:
        factor = Factor(times, (0.9 * times, 1.1 * times), 6)
        accuracy = Accuracy("accuracy", value, (value - 0.01, value + 0.01), 1000, "validation", 0.9 - value,
                            (0.88 - value, 0.92 - value))  # fmt: skip
        return Stage(step, f"steps/{step}", "0", 1000, 4000, "f32", accuracy, factor, factor, factor, times)

    reference = stage("", 0.9, 1.0)
    pruned = msgspec.structs.replace(stage("prune:0.5", 0.89, 2.0), kept="stem (stem is frozen)")
    return Compression(
        model="mine",
        engine="openvino",
        budget=AccuracyBudget(0.05),
        reference=msgspec.structs.replace(reference, throughput=None, over_parent=None, latency=None),
        attempts=(
            Attempt("bf16", (stage("bf16", 0.89, 2.0),)),
            Attempt("prune:0.5,int8", (pruned, stage("int8", 0.88, 3.0))),
            Attempt("prune:0.9,int8", (), "nothing of mine can be pruned"),
        ),
        best=best,
        verdict="best" if best else "no gain",
        summary="as it is",
        test=reference.accuracy,
        reference_test=reference.accuracy,
        confirmations=(Confirmation((0, 0), reference.accuracy), Confirmation((1, 1), None, "they are no numbers")),
    )


def printed(plan: Plan, run: Path | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(SummaryTable(plan, run))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
