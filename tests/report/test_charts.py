"""The charts: what they draw and where, and that nothing in them is cut off or covered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from runs import CERTIFICATE, ESTIMATE, SLO_50, TRIALS, WINNER, compressed, judged, make_plan, make_run

from rushhour.measurement import Measurement, Outcome
from rushhour.plan import LadderStep, Trial
from rushhour.report import charts
from rushhour.report.charts import accuracy, compression, funnel, latency, percentiles, steps
from rushhour.report.charts.palette import style
from rushhour.report.findings import Capacity, Findings


def drawn(windows: list[Measurement], capacity: Capacity | None = None) -> Any:
    with style("latency"):
        return latency.draw_latency([charts.Series("plan", True, windows, capacity)], SLO_50).axes[0]


def joined(axes: Any) -> list[list[float]]:
    """The rates along each line of p99s."""
    return [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]


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


def test_the_answer_of_the_plane_stands_at_its_window_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "proven")

    def answer(folder: Path) -> accuracy.Point:
        points, _ = accuracy.points_of(Findings.read(folder))
        return next(point for point in points if point.trial.candidate == WINNER)

    assert answer(run)[1:2] + answer(run)[3:] == (9120.0, "proven", None)
    estimated = make_run(tmp_path / "estimated", make_plan(**ESTIMATE))
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


@pytest.mark.parametrize("narrow", [False, True])
def test_the_funnel_is_longest_first_and_nothing_is_cut_off(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(funnel, "svg", lambda figure, *_: figures.append(figure))
    charts.plans_left(CERTIFICATE, narrow)
    axes = figures[0].axes[0]
    figures[0].draw_without_rendering()
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] > 0.05, "one of 4,320 can be seen"
    for text in [each for each in (*axes.texts, *axes.get_yticklabels()) if each.get_text()]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figures[0].bbox.x1 * 1.005, text.get_text()


def test_a_search_that_removed_nothing_has_no_funnel() -> None:
    assert charts.plans_left(msgspec.structs.replace(CERTIFICATE, plans=1, cuts=())) is None


@pytest.mark.parametrize("narrow", [False, True])
def test_no_text_of_the_steps_covers_another(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest step is the longest bar, and its capacity an estimate: it ran into the gain at the right."""
    ladder = (
        LadderStep("as it is", TRIALS[0].candidate, 148.0, None, 0.9094),
        LadderStep("batched, pruned, split and distilled", WINNER, 5908.0, None, 0.9052),
    )
    plan = make_plan(ladder=ladder, capacity_rps=5908.0, baseline_capacity_rps=148.0, proven=False, p99_ms=None)
    drawn: list[Any] = []
    monkeypatch.setattr(steps, "svg", lambda figure, *_: drawn.append(figure) or "")
    charts.capacity_by_step(Findings("run", plan, ()), narrow)
    (axes,) = drawn[0].axes
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) > 2 or narrow
    for index, box in enumerate(boxes):
        assert drawn[0].bbox.x0 <= box.x0 <= box.x1 <= drawn[0].bbox.x1, "cut at the side"
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
