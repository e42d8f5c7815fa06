"""The reports: each is one small file that loads nothing, shows everything, and invents no number."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from rushhour.cli import cli
from rushhour.errors import PlanError, RushhourError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Accuracy, Measurement, Outcome, pack_latencies
from rushhour.plan import SO_FAR, Evidence, Plan, Policy, Rung, Trial, Variant
from rushhour.records.compression import Attempt, Compression, Confirmation, Factor, Stage
from rushhour.records.journal import Entry, Journal
from rushhour.report import SummaryTable, charts, read_plan, wording, write_compression_report, write_report
from rushhour.report.charts import accuracy, compression, latency, percentiles
from rushhour.report.charts.palette import style
from rushhour.report.comparison import side_by_side
from rushhour.report.findings import Capacity, Findings, evidence_of
from rushhour.system.machine import describe

SLO_50 = SLO(percentile=99, limit_s=0.05)
HOSTILE = "<script>alert('1')</script>&\"$x^2$ 漢字\x07"
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
            Rung("as it is", BASELINE, 388.0, None, 0.9094),
            Rung("compiled", "reference/openvino/f32/s1t2b1", 962.0, None, 0.9094),
            Rung("batched", "reference/openvino/bf16/s2t1b16", 3610.0, None, 0.909),
            Rung("quantised", WINNER, 9120.0, None, 0.9052),
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
    fields = {key: value for key, value in changes.items() if key in Plan.__struct_fields__}
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "fashion-mnist")


@pytest.fixture(scope="module")
def content(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def page(content: str) -> Page:
    return Page(content)


def test_it_is_one_small_file_that_loads_nothing(content: str, page: Page) -> None:
    assert len(content.encode()) < 400_000
    assert re.findall(r"https?://(?!127\.0\.0\.1)", content) == []
    assert "@import" not in content
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))


def test_the_headline_says_the_answer(page: Page) -> None:
    answer = (
        "fashion-mnist: 9,120 requests/s within p99<50ms, 24× the baseline, "
        "accuracy 90.52% (89.93 to 91.08), drop 0.42 points"
    )
    assert page.text.count(answer) == 2  # the title and the first heading
    assert "Nearest miss" not in page.text


def test_every_candidate_and_every_window_is_there(page: Page) -> None:
    for each in TRIALS:
        assert each.candidate in page.text
        assert each.why in page.text
    assert page.text.count("search") == 7 * len(CAPACITIES)
    assert "insufficient samples (n = 200)" in page.text
    assert "none: unstable (n = 6,000)" in page.text


def test_a_p99_comes_with_its_interval_and_n(page: Page) -> None:
    proof = load(WINNER, CAPACITIES[WINNER], 101)
    assert wording.p99(proof) in page.text
    assert "n = 6,000" in wording.p99(proof)


def test_all_four_charts_are_there_and_say_what_they_show(page: Page) -> None:
    labels = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    wide, narrow = labels[::2], labels[1::2]
    assert [label.split()[0] for label in wide] == ["Accuracy", "Latency", "Latency", "Capacity"]
    assert narrow == wide, "each is drawn for a desk and for a phone"
    assert f"winner: {WINNER}" in page.text
    assert f"baseline: {BASELINE}" in page.text


def test_every_reference_has_its_one_target(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "use":
            assert (attributes["href"] or "").removeprefix("#") in ids
        if "clip-path" in attributes:
            assert re.fullmatch(r"url\(#(.+)\)", attributes["clip-path"] or "")[1] in ids  # type: ignore[index]


def test_the_charts_take_their_colours_from_the_page(content: str) -> None:
    assert "var(--plan)" in content
    assert not re.search(r"#0102\w\w", content)


def test_the_same_run_gives_the_same_bytes(run: Path, content: str) -> None:
    assert write_report(run).read_text("utf-8") == content


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    winner = msgspec.structs.replace(TRIALS[5], candidate=HOSTILE, why=HOSTILE)
    plan = make_plan(
        trials=(TRIALS[0], winner),
        ladder=(Rung(HOSTILE, BASELINE, 388.0, None, None), Rung(HOSTILE, HOSTILE, 9120.0, 41.0, 0.9)),
        variants=(Variant(HOSTILE, HOSTILE, HOSTILE, "openvino", "int8"),),
    )
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), plan)
    content = write_report(run).read_text("utf-8")
    assert "<script" not in content
    assert "$x^2$ 漢字" in content
    assert "script" not in {tag for tag, _ in Page(content).tags}


def test_a_nearest_miss_is_labelled_loudly(tmp_path: Path) -> None:
    plan = make_plan(feasible=False, accuracy_drop=0.017, accuracy_drop_interval=(0.0131, 0.0208))
    text = Page(write_report(make_run(tmp_path, plan)).read_text("utf-8")).text
    assert text.startswith("Nearest miss")
    assert "Nearest miss: no plan meets the goal" in text
    assert "the drop is 1.70 points (1.31 to 2.08), and the upper end of its interval must be at most 1%" in text
    assert f"nearest miss: {WINNER}" in text
    assert text.count("Nearest miss") == 3  # the title, the first heading and the banner
    assert "★ winner" not in text


def test_what_held_at_no_rate_gets_no_star_at_its_prediction(tmp_path: Path) -> None:
    plan = make_plan(feasible=False, capacity_rps=0.0, p99_ms=None, p99_interval_ms=None)
    text = Page(write_report(make_run(tmp_path, plan)).read_text("utf-8")).text
    assert f"nearest miss: {WINNER} predicted only" in text
    assert f"{WINNER}: 9,480/s predicted" in text
    assert "No rate is within p99<50ms, proven or estimated" in text


def test_windows_of_every_outcome_are_shown(tmp_path: Path) -> None:
    """One that the page had no mark for ended a tuning run in a traceback."""
    run = make_run(tmp_path)
    journal = Journal(run / "measurements.jsonl")
    for index, outcome in enumerate(Outcome):
        window = msgspec.structs.replace(load(WINNER, 5000.0 + index, 50 + index), outcome=outcome)
        journal.measure("search", WINNER, f"every {outcome}", Measurement, lambda window=window: window)
    text = Page(write_report(run).read_text("utf-8")).text
    for outcome in Outcome:
        assert outcome.value.replace("_", " ") in text
    for key in ("inconclusive", "failed", "void, generator-limited", "no p99"):
        assert key in text
    assert "an inconclusive window is neither" in text


ESTIMATE: dict[str, object] = {
    "proven": False,
    "capacity_rps": 8930.0,
    "capacity_interval_rps": (8410.0, 9120.0),
    "p99_ms": None,
}


def test_an_estimate_is_called_one_everywhere(tmp_path: Path) -> None:
    """The list of candidates and the ladder once kept what the search had found before, 9,120/s, without a word."""
    plan = make_plan(**ESTIMATE)
    content = write_report(make_run(tmp_path, plan)).read_text("utf-8")
    text = Page(content).text
    assert "8,930 requests/s (8,410 to 9,120; estimated, not proven) within p99<50ms, about 23× the baseline" in text
    assert "estimated, not proven (8,410 to 9,120)" in text
    rows = [Page(row).text for row in re.findall("<tr.*?</tr>", content, re.DOTALL)]
    told = [row for row in rows if WINNER in row and row.startswith(("★ won", "quantised"))]
    assert len(told) == 2, "the ladder's last step and the winner among the candidates"
    for row in told:
        assert "8,930/s" in row
        assert "estimated, not proven" in row
        assert "9,120/s" not in row
    assert "the proof:" not in text
    # The page once said that no window was a proof, where some had passed; then that one proved a rate beside a
    # headline of "not proven".
    assert re.search(r"The highest rate at which a window passed is 9,120/s \(\d+ of 6,000 late\)", text)
    assert not re.search(r"proven by a window|proved", text)
    assert "estimated, not proven (8,410 to 9,120)" in str(side_by_side(plan)[0])
    assert side_by_side(plan)[1].plan == "not measured at that rate"


def test_an_estimate_without_any_proof_says_so(tmp_path: Path) -> None:
    make_plan(**ESTIMATE).save(tmp_path / "plan.json")
    (tmp_path / "measurements.jsonl").touch()
    assert "No window passed" in Page(write_report(tmp_path).read_text("utf-8")).text


REFUSAL, LATE = "torch has no kernel for QLinearConv", "the time was up before it was loaded"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, str]:
    """A plan with names, a tie, what the time did not suffice for, one refusal of eight candidates and a step above
    the plan, on a host whose speed was measured; and the text of its page."""
    refused = [trial(f"int8/torch/int8/s{streams}t1b1", "failed", None, None, REFUSAL) for streams in range(1, 9)]
    trials = (
        TRIALS[0],
        *(
            msgspec.structs.replace(each, name=f"name {index} on OpenVINO")
            for index, each in enumerate((TRIALS[5], *refused))
        ),
        trial("int8/openvino/int8/s1t2b16", "tied", 9400.0, 0.0042, "within 3% of the winner in 12 paired windows"),
        trial("int8/openvino/int8/s4t1b8", "skipped", 9000.0, 0.0042, LATE),
        trial("int8/openvino/int8/s4t1b4", "skipped", 8000.0, 0.0042, LATE),
    )
    steps = evidence_of(make_plan()).ladder
    above = msgspec.structs.replace(steps[2], capacity_rps=9500.0, p99_ms=None)
    plan = make_plan(trials=trials, ladder=(*steps[:2], above, steps[3]))
    run = make_run(tmp_path_factory.mktemp("odd"), plan)
    journal = run / "measurements.jsonl"
    entries = [msgspec.json.decode(line, type=Entry) for line in journal.read_bytes().splitlines()]
    speeds = (*[0.8] * 11, *[1.02] * 89)
    entries = [
        msgspec.structs.replace(entry, reading=msgspec.structs.replace(entry.reading, speeds=speeds))
        if entry.phase == "confirm"
        else entry
        for entry in entries
    ]
    journal.write_bytes(msgspec.json.Encoder().encode_lines(entries))
    return plan, Page(write_report(run).read_text("utf-8")).text


def test_people_see_names_and_the_key_small(odd: tuple[Plan, str]) -> None:
    plan, text = odd
    assert "winner: name 0 on OpenVINO" in text
    assert f"name 0 on OpenVINO {WINNER}" in text
    assert "name 0 on" in printed(plan)
    assert "s2t1b32" not in printed(plan)


def test_a_refusal_is_said_once(odd: tuple[Plan, str]) -> None:
    _, text = odd
    assert text.count(REFUSAL) == text.count(LATE) == 1
    assert "failed ×8 8 candidates: name 1 on OpenVINO; name 2 on OpenVINO;" in text
    assert "and 2 more" in text


def test_a_tie_and_what_was_skipped_are_plain_words(odd: tuple[Plan, str]) -> None:
    """The page had no place for either, and ended in a traceback."""
    _, text = odd
    assert "1 tied with the winner under load" in text
    assert "2 skipped, no time left" in text


def test_a_step_above_the_plan_is_explained(odd: tuple[Plan, str]) -> None:
    _, text = odd
    assert "The step “batched” has a higher capacity than the plan (9,500/s, estimated, not proven, against" in text
    assert "a proof needs a lower rate than an estimate" in text
    assert "about 0.96×" in text


def test_the_host_s_speed_during_the_proof_is_said(odd: tuple[Plan, str], page: Page) -> None:
    _, text = odd
    assert "Host speed during the proof: median 1.02, 10th percentile 0.80." in text
    assert "Host speed" not in page.text


# -- a run that was interrupted


def test_an_interrupted_run_is_reported_as_such(tmp_path: Path) -> None:
    """It said that there is no plan."""
    run = make_run(tmp_path)
    (run / "plan.json").rename(run / SO_FAR)
    text = Page(write_report(run).read_text("utf-8")).text
    assert "The run was interrupted, or is not finished yet. This is the best plan so far" in text
    assert f"winner: {WINNER}" in text
    assert read_plan(run) == (Plan.load(run / SO_FAR), False)
    done = CliRunner().invoke(cli, ["report", str(run), "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    assert "the run was broken off" in done.output
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes())["finished"] is False
    make_plan(capacity_rps=9000.0).save(run / "plan.json")
    assert "was interrupted" not in Page(write_report(run).read_text("utf-8")).text
    assert read_plan(run)[1], "what was found at the end counts, whatever else lies there"


def test_a_run_that_was_interrupted_early_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "plan.json").unlink()
    with pytest.raises(PlanError, match=r"interrupted before it found one; run the same command again to continue"):
        write_report(run)
    make_plan(evidence=None).save(run / SO_FAR)
    with pytest.raises(
        PlanError, match=r"interrupted before its best plan so far, int8, was .*rushhour serve"
    ) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    (run / SO_FAR).write_text("{")
    with pytest.raises(PlanError, match="cannot be read"):
        write_report(run)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PlanError, match="there is no plan at"):
        write_report(tmp_path / "nothing")


# -- what the charts draw, and where


def drawn(windows: list[Measurement], capacity: Capacity | None = None) -> Any:
    with style("latency"):
        return latency.draw_latency([charts.Series("plan", True, windows, capacity)], SLO_50).axes[0]


def joined(axes: Any) -> list[list[float]]:
    """The rates along each line of p99s."""
    return [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]


def judged(rate: float, outcome: Outcome, late: int = 0) -> Measurement:
    return msgspec.structs.replace(load(WINNER, rate, 1), outcome=outcome, late=late)


def test_lines_join_only_windows_within_the_slo() -> None:
    few, many = 30, 300
    windows = [
        judged(2000.0, Outcome.PASS),
        judged(2100.0, Outcome.INCONCLUSIVE, few),
        judged(2200.0, Outcome.VOID),
        judged(2300.0, Outcome.INCONCLUSIVE, many),
        judged(2400.0, Outcome.PASS),
        judged(2500.0, Outcome.FAIL, many),
        judged(2600.0, Outcome.PASS),
        judged(2700.0, Outcome.PASS),
        judged(2800.0, Outcome.UNSTABLE, many),
        judged(2900.0, Outcome.GENERATOR_LIMITED),
    ]
    assert joined(drawn(windows)) == [[2000.0, 2100.0, 2400.0], [2600.0, 2700.0]]


def test_the_star_stands_at_the_window_that_is_the_proof() -> None:
    proof = judged(2400.0, Outcome.PASS)
    windows = [judged(2000.0, Outcome.PASS), proof, judged(3000.0, Outcome.FAIL, 300)]

    def stars(capacity: Capacity) -> list[tuple[float, float]]:
        lines = [line for line in drawn(windows, capacity).lines if line.get_gid() == "proof"]
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]

    assert stars(Capacity(2400.0, True, p99_ms=proof.p99_ms, window=proof)) == [(2400.0, proof.p99_ms)]
    assert stars(Capacity(2550.0, False, (2450.0, 2700.0), window=proof)) == [], "nothing was measured there"


def test_the_answer_of_the_plane_stands_at_its_window_too(run: Path, tmp_path: Path) -> None:
    def answer(folder: Path) -> accuracy.Point:
        points, _ = accuracy.points_of(Findings.read(folder))
        return next(point for point in points if point.trial.candidate == WINNER)

    assert answer(run)[1:2] + answer(run)[3:] == (9120.0, "proven", None)
    estimated = make_run(tmp_path, make_plan(**ESTIMATE))
    assert answer(estimated)[1:2] + answer(estimated)[3:] == (8930.0, "estimated", (8410.0, 9120.0))


@pytest.mark.parametrize(
    ("rates", "scale"), [((2000.0, 2500.0, 3000.0), "linear"), ((2000.0,), "linear"), ((200.0, 9000.0), "log")]
)
def test_axes_begin_where_the_data_are(rates: tuple[float, ...], scale: str) -> None:
    axes = drawn([judged(rate, Outcome.PASS) for rate in rates])
    low, high = axes.get_xlim()
    assert axes.get_xscale() == scale
    assert 0.6 * min(rates) < low < min(rates)
    assert max(rates) < high < 1.6 * max(rates)
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 9


def test_a_plan_with_numbers_only_still_makes_a_page(tmp_path: Path) -> None:
    make_plan(trials=(), ladder=(), p99_ms=None, p99_interval_ms=None, capacity_rps=0.0).save(tmp_path / "plan.json")
    (tmp_path / "measurements.jsonl").touch()
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "No rate is within p99<50ms" in page.text
    assert "The plan names no candidates" in page.text


def test_thousands_of_candidates_stay_under_two_megabytes(tmp_path: Path) -> None:
    many = tuple(
        msgspec.structs.replace(TRIALS[6], candidate=f"int8/openvino/int8/s4t1b{index}", predicted_rps=1000.0 + index)
        for index in range(5000)
    )
    path = write_report(make_run(tmp_path, make_plan(trials=(*TRIALS, *many))))
    assert path.stat().st_size < 2_000_000
    text = Page(path.read_text("utf-8")).text
    assert "5011 candidates" in text
    assert "The first 1000 are shown; all are in plan.json" in text


def test_a_regression_speaks_of_r2(tmp_path: Path, page: Page) -> None:
    text = Page(write_report(make_run(tmp_path, make_plan(metric="r2"))).read_text("utf-8")).text
    assert "R2 against capacity" in text
    assert "R2 against capacity" not in page.text


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no plan at"):
        write_report(tmp_path)
    make_plan().save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="there are no measurements at"):
        write_report(tmp_path)
    make_run(tmp_path, make_plan(evidence=None))
    with pytest.raises(PlanError, match="has no evidence"):
        write_report(tmp_path)
    (tmp_path / "measurements.jsonl").write_text("nonsense\n")
    make_plan().save(tmp_path / "plan.json")
    with pytest.raises(RushhourError, match="cannot read line 1"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
    console.print(SummaryTable(plan))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_fits_80_columns_without_colour() -> None:
    text = printed(make_plan())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    for said in (
        "9,120/s",
        "388/s",
        "24×",
        "90.52%",
        "0.42 points",
        "2.79 million",
        "2.90 MB",
        "3.9× less",
        "openvino",
    ):
        assert said in text


def test_the_summary_of_a_nearest_miss_says_so() -> None:
    text = printed(make_plan(feasible=False, baseline_capacity_rps=0.0, baseline_p99_ms=None))
    assert "NEAREST MISS" in text
    assert "nearest miss" in text
    assert "no rate within the SLO" in " ".join(text.split())


def test_the_summary_keeps_brackets_of_a_name() -> None:
    odd = msgspec.structs.replace(make_plan().goal, slo=SLO.parse("p95<800us"))
    assert "p95<800us" in printed(make_plan(goal=odd))
    with pytest.raises(PlanError, match="has no evidence"):
        SummaryTable(make_plan(evidence=None))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (9.996, "10.0"), (41.23, "41.2"), (1234.5, "1,230"), (-0.004, "−0.00400"), (0.0123, "0.0123")],
)
def test_numbers_have_three_digits(value: float, said: str) -> None:
    assert wording.number(value) == said


def test_words_for_numbers() -> None:
    assert wording.rate(9120.4) == "9,120/s"
    assert wording.rate(12.345) == "12.3/s"
    assert wording.rate(None) == "not measured"
    assert wording.drop(-0.0012, "accuracy") == "−0.12 points"
    assert wording.drop(-0.00001, "accuracy") == "0.00 points"
    assert wording.factor(10.0, 0.0) == ""
    assert wording.factor(2.56, 1.0) == "2.6×"
    assert wording.factor(9120.0, 388.0) == "24×"
    assert wording.size(512) == "512 B"
    assert wording.amount(999) == "999"
    assert wording.milliseconds(None) == "insufficient samples"
    assert wording.policy(Policy(streams=1, threads=2)) == "1 stream × 2 threads, one at a time"


LONG = "reference quantised to int8 on OpenVINO, 2 streams of 1 thread, batches up to 32"


@pytest.mark.parametrize(
    ("rates", "drop"),
    [
        ((388.0, 9120.0), 0.0042),  # far from each other
        ((9000.0, 9120.0), 0.0),  # one beside the other
        ((9120.0, 9120.0), 0.0),  # one on the other
        ((9120.0, 9121.0), 0.008),
        ((4500.0, 5200.0), 0.0001),  # in the middle, where either side has half of the width
        ((100.0, 101.0), -0.004),
        ((9120.0, 388.0), 0.0042),
    ],
)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("proven", [True, False])
def test_the_names_of_baseline_and_winner_never_overlap(
    rates: tuple[float, float], drop: float, narrow: bool, proven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_names(rates, drop, narrow, proven, monkeypatch)


def _check_names(
    rates: tuple[float, float],
    drop: float,
    narrow: bool,
    proven: bool,
    monkeypatch: pytest.MonkeyPatch,
    beside: Sequence[Trial] = (),
) -> None:
    trials = [
        msgspec.structs.replace(
            each, name=f"{fate} {LONG}", capacity_rps=rps, accuracy=0.9094 - lost, accuracy_drop=lost
        )
        for fate, each, rps, lost in (
            ("baseline", TRIALS[0], rates[0], 0.0),
            ("winner", TRIALS[5], rates[1], drop),
        )
    ] + list(beside)
    changes: dict[str, Any] = {} if proven else {"proven": False, "p99_ms": None}
    plan = make_plan(trials=tuple(trials), ladder=(), capacity_rps=rates[1], baseline_capacity_rps=rates[0], **changes)
    drawn: list[Any] = []
    monkeypatch.setattr(accuracy, "svg", lambda figure, *_: drawn.append(figure) or "")
    charts.accuracy_against_capacity(Findings("run", plan, ()), narrow)
    (axes,) = drawn[0].axes
    drawn[0].draw_without_rendering()
    names = {text.get_text().split(":")[0].split("\n")[0]: text.get_window_extent() for text in axes.texts}
    assert {"baseline", "winner"} <= names.keys()
    boxes = list(names.values())
    page = drawn[0].bbox
    for index, box in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, "cut at the side"
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :]), list(names)
        for line in axes.lines:
            if (line.get_gid() or "").startswith("point-"):
                x, y = axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
                assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1), "a name covers a point"


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rps", [303.0, 9400.0])
@pytest.mark.parametrize("drop", [-0.002, 0.0015, 0.006])
def test_names_cover_no_points(rps: float, drop: float, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner's name was written over the candidates beside it, and before the legend moved the axes."""
    beside = [
        msgspec.structs.replace(TRIALS[6], bundle=f"at {lost}", accuracy=0.9094 - lost, predicted_rps=share * 9120.0)
        for share in (0.7, 0.8, 0.9, 1.0, 1.1)
        for lost in (0.0, drop)
    ]
    _check_names((rps, 9120.0), drop, narrow, False, monkeypatch, beside)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("role", ["winner", "nearest miss"])
def test_no_legend_is_cut_off(role: str, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second column of the latency chart's legend ended beyond the drawing."""
    figures: list[Any] = []
    for module in (accuracy, compression, latency, percentiles):
        monkeypatch.setattr(module, "svg", lambda figure, *_: figures.append(figure) or "")
    windows = [judged(2000.0 + index, outcome, 30) for index, outcome in enumerate(Outcome)]
    estimate = Capacity(8930.0, False, (8410.0, 9120.0), window=judged(8400.0, Outcome.INCONCLUSIVE))
    series = [
        charts.Series("baseline", False, windows, estimate),
        charts.Series(role, True, windows, estimate),
    ]
    many = tuple(
        msgspec.structs.replace(TRIALS[6], candidate=f"int8/openvino/int8/s4t1b{index}", predicted_rps=1000.0 + index)
        for index in range(5000)
    )
    plan = make_plan(trials=(*TRIALS, *many), **ESTIMATE)
    charts.latency_against_rate(series, SLO_50, narrow)
    charts.latency_distribution(series, SLO_50, narrow)
    charts.accuracy_against_capacity(Findings("run", plan, ()), narrow)
    charts.compression_trade_off(compressed((1, 0)), narrow)
    charts.compression_sizes(compressed((1, 0)), narrow)
    assert len(figures) == 5
    for figure in figures:
        figure.draw_without_rendering()
        shown = figure.axes[0].get_legend().get_window_extent()
        page = figure.bbox
        assert page.x0 <= shown.x0 <= shown.x1 <= page.x1, "cut at the side"
        assert page.y0 <= shown.y0 <= shown.y1 <= page.y1, "cut above"


# What a compression found


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
        said="as it is",
        test=reference.accuracy,
        reference_test=reference.accuracy,
        confirmations=(Confirmation((0, 0), reference.accuracy), Confirmation((1, 1), None, "they are no numbers")),
    )


def test_the_report_of_a_compression_has_no_empty_rows_and_stars_one_step(tmp_path: Path) -> None:
    """Each recipe began with a row that said its name and nothing else; equal stages had a star each."""
    compressed((1, 0)).save(tmp_path)
    page = write_compression_report(tmp_path).read_text()
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    assert len(rows) == 5, "the reference, three steps, and the unfinished recipe"
    assert all(len(row) > 4 for row in rows)
    assert [row.count("★") for row in rows] == [0, 0, 1, 0, 0]
    assert "not changed: stem (stem is frozen)" in page
    assert "not finished: nothing of mine can be pruned" in page
    confirmed = page[page.index("Confirmed on the test part") :]
    assert "within 5%" in confirmed
    assert "they are no numbers" in confirmed


@pytest.mark.parametrize("best", [None, (0, 0), (1, 0)])
def test_the_star_hides_no_point(best: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(compression, "svg", lambda figure, *_: figures.append(figure))
    charts.compression_trade_off(compressed(best))
    lines = figures[0].axes[0].lines
    star = next(line for line in lines if line.get_marker() == "*")
    points = [line for line in lines if line.get_marker() in ("o", "s")]
    assert len(points) == 4, "the reference, and each step"
    assert all(point.get_zorder() > star.get_zorder() for point in points)
