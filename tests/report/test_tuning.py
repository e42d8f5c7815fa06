"""The report of a tuning run: one small file that loads nothing, shows everything, and invents no number."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from runs import (
    BASELINE,
    CAPACITIES,
    CERTIFICATE,
    DECISIONS,
    ESTIMATE,
    TRIALS,
    WINNER,
    Page,
    load,
    make_plan,
    make_run,
    printed,
    trial,
)

from rushhour.cli import cli
from rushhour.errors import PlanError, RushhourError
from rushhour.ladder import LadderPoint
from rushhour.measurement import Measurement, Outcome
from rushhour.plan import SO_FAR, FrontPoint, LadderStep, Plan, Relaxation, Variant
from rushhour.records.journal import Entry, Journal
from rushhour.report import read_plan, wording, write_report
from rushhour.report.comparison import side_by_side
from rushhour.report.findings import evidence_of

HOSTILE = "<script>alert('1')</script>&\"$x^2$ 漢字\x07"


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
        ladder=(LadderStep(HOSTILE, BASELINE, 388.0, None, None), LadderStep(HOSTILE, HOSTILE, 9120.0, 41.0, 0.9)),
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
    # The terminal once said that of every estimate, where the page had the window next to it.
    (shown,) = re.findall(r"\S+ ms at 8,\d+/s \(n = [\d,]+\)", printed(plan, tmp_path, width=200))
    assert shown in text


def test_an_interval_that_is_a_point_is_a_lower_bound(tmp_path: Path) -> None:
    """Where nothing above was tried. It was called "8,930 to 8,930", as if it were known exactly."""
    plan = make_plan(**{**ESTIMATE, "capacity_interval_rps": (8930.0, 8930.0)})
    assert "estimated, not proven (at least 8,930)" in str(side_by_side(plan)[0])
    assert "8,930 to 8,930" not in Page(write_report(make_run(tmp_path, plan)).read_text("utf-8")).text


def test_an_estimate_without_any_proof_says_so(tmp_path: Path) -> None:
    make_plan(**ESTIMATE).save(tmp_path / "plan.json")
    (tmp_path / "measurements.jsonl").touch()
    assert "No window passed" in Page(write_report(tmp_path).read_text("utf-8")).text


def test_a_plan_of_an_older_version_has_neither_certificate_nor_decisions(content: str) -> None:
    assert "load tests of" not in content
    assert 'id="decisions"' not in content


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> str:
    plan = make_plan(certificate=CERTIFICATE, decisions=DECISIONS)
    return write_report(make_run(tmp_path_factory.mktemp("certified"), plan)).read_text("utf-8")


def test_the_certificate_is_said_near_the_headline_and_explained(certified: str) -> None:
    text = Page(certified).text
    assert text.index(CERTIFICATE.statement) < text.index("Side by side")
    assert text.count(CERTIFICATE.statement) == 2
    for said in (
        "is expected to carry 1.2% more than this one, and at 95% at most 3.9% more",
        "1,440 were simulated on measured service times, and 11 candidates put under load",
        "The bound is about the 1,044 plans known to be within the accuracy budget",
        "err by 6.2% (one standard deviation)",
        "as on the 7 candidates that were measured in this run",
        CERTIFICATE.not_covered[0],
        *(cut.rule for cut in CERTIFICATE.cuts),
    ):
        assert said in text


def test_the_decisions_say_what_they_cost(certified: str) -> None:
    text = Page(certified).text
    for decision in DECISIONS:
        assert f"{decision.decided} {decision.seen}. Rule: {decision.why}." in text
    assert "4 decisions on 6 min 18 s of measurement and training" in text
    assert "Show all decisions" not in text
    assert "confirm 4 min 10 s 1 load test 9,120/s proven" in text


def test_the_funnel_goes_from_all_plans_to_one(certified: str) -> None:
    labels = [attributes.get("aria-label") or "" for tag, attributes in Page(certified).tags if tag == "svg"]
    assert (
        labels.count(
            "Plans left: all plans 4,320, smaller networks timed 2,880, networks trained 1,440, "
            "batch bounds simulated 120, accuracy judged 87, capacities predicted 4, put under load 1"
        )
        == 2
    )


def test_many_decisions_are_folded(tmp_path: Path) -> None:
    plan = make_plan(decisions=DECISIONS * 8)
    text = Page(write_report(make_run(tmp_path, plan)).read_text("utf-8")).text
    assert "Show all decisions" in text
    assert text.count(DECISIONS[3].seen) == 8


def test_without_a_bound_the_page_says_why(tmp_path: Path) -> None:
    none = msgspec.structs.replace(
        CERTIFICATE, statement="In 3 load tests of 7 plans: no plan within the goal", expected_regret=None,
        regret_bound=None, sigma=None, residuals=0, covered=0, why="no plan met the goal", cuts=(), not_covered=(),
    )  # fmt: skip
    text = Page(write_report(make_run(tmp_path, make_plan(certificate=none, feasible=False))).read_text("utf-8")).text
    assert "In 3 load tests of 7 plans: no plan within the goal. There is no bound: no plan met the goal." in text
    assert "The bound is about" not in text


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
    assert "2 skipped, not measured" in text


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


@pytest.mark.slow
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
    assert "the run was interrupted" in done.output
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


def test_a_plan_with_numbers_only_still_makes_a_page(tmp_path: Path) -> None:
    make_plan(trials=(), ladder=(), p99_ms=None, p99_interval_ms=None, capacity_rps=0.0).save(tmp_path / "plan.json")
    (tmp_path / "measurements.jsonl").touch()
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "No rate is within p99<50ms" in page.text
    assert "The plan names no candidates" in page.text


@pytest.mark.slow
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


def point(candidate: str, kind: str, rps: float, drop: float, size: int, *, chosen: bool = False) -> FrontPoint:
    return msgspec.convert(
        {
            "candidate": candidate,
            "name": f"the name of {candidate}",
            "kind": kind,
            "capacity_rps": rps,
            "capacity_interval_rps": (0.9 * rps, 1.1 * rps) if kind != "proven" else None,
            "accuracy": 0.9094 - drop,
            "accuracy_drop": drop,
            "accuracy_drop_interval": (drop - 0.003, drop + 0.003),
            "model_bytes": size,
            "chosen": chosen,
        },
        type=FrontPoint,
    )


def test_a_ladder_is_a_table_with_what_each_variant_carries_and_costs(page: Page, tmp_path: Path) -> None:
    plan = make_plan()
    first = plan.variants[0]
    plan = msgspec.structs.replace(plan, variants=(first, msgspec.structs.replace(first, name="fast")))
    plan = plan.with_ladder(
        [
            LadderPoint(first.name, 16, 400.0, 0.9094, 0.0, (0.0, 0.0), measured="test part, 10,000 samples"),
            LadderPoint("fast", 32, 9120.0, 0.89, 0.0194, (0.015, 0.024)),
        ],
        window=50_000,
    )
    text = Page(write_report(make_run(tmp_path / "run", plan)).read_text("utf-8")).text
    table = text.partition("The ladder: variants that follow the load")[2].partition("Latency under load")[0]
    for said in ("50,000 answers", first.name, "400/s", "test part, 10,000 samples", "fast", "9,120/s", "1.94 points"):
        assert said in table, said
    assert "The ladder: variants" not in page.text


def test_the_pareto_front_is_a_table_and_a_line_and_the_plan_says_why(page: Page, tmp_path: Path) -> None:
    older = page
    front = (
        point(WINNER, "proven", 9120.0, 0.0042, 2_903_312, chosen=True),
        point("reference/openvino/bf16/s2t1b16", "estimated", 3610.0, 0.0004, 5_600_000),
        point("reference/openvino/f32/s2t1b8", "predicted", 1800.0, 0.0, 11_180_405),
    )
    forced = msgspec.structs.replace(TRIALS[5], fate="tied", rule="forced test: one step from the leader")
    left = msgspec.structs.replace(TRIALS[6], fate="not preferred", why="measurably less accurate")
    plan = make_plan(
        front=front,
        choice="of 3 points of the Pareto front, this one by capacity",
        relaxations=(Relaxation("cores", "4 cores", 17_000.0, "predicted", WINNER, "int8"),),
        trials=(*TRIALS[:5], TRIALS[5], msgspec.structs.replace(forced, candidate="int8/openvino/int8/s2t1b48"), left),
    )
    content = write_report(make_run(tmp_path / "run", plan)).read_text("utf-8")
    page = Page(content)
    table = page.text.partition("Pareto front of accuracy, capacity and size")[2].partition("Latency under load")[0]
    for said in (
        *("9,120/s", "proven", "3,610/s", "(3,249 to 3,971)", "estimated", "1,800/s", "predicted"),
        *("90.52%", "0.42 points", "2.90 MB", "11.2 MB"),
        "Why this plan: of 3 points of the Pareto front, this one by capacity.",
        "If you allowed: 4 cores: 17,000/s, predicted.",
    ):
        assert said in table, said
    assert "Pareto front, measured under load" not in content, "predicted points are on the line too"
    assert "forced test: one step from the leader; " in page.text
    assert "1 within the goal, but not preferred" in page.text
    assert "Pareto front of" not in older.text, "a plan of an earlier version has none"
