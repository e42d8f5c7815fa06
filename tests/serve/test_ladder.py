"""A cell and a server that move along their ladder: real bundles and engines, every answer compared."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_lifecycle import get, load, metric, wait_until
from test_supervisor import Clients, cells_of

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import Clock, WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import EngineError, PlanError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.ladder import LadderPoint
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy
from rushhour.plan import Variant as PlanVariant
from rushhour.serve import ServeSettings, open_target
from rushhour.serve.opening import opener
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.ladder import Ladder
from rushhour.serve.scheduling.variant import Variant
from rushhour.serve.service import Service
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers
from rushhour.wire import Codec, InferRequest, Wanted, encode_request

Result = Sequence[memoryview] | Exception
WANTED = Wanted(id="", outputs=(0,), binary=(True,))
NAMES = ("whole", "half", "small")
SEEDS = dict(zip(NAMES, (0, 7, 11), strict=True))
DROPS = dict(zip(NAMES, (0.0, 0.02, 0.05), strict=True))
QUIET_RPS, RUSH_RPS = 40.0, 100_000.0


# A cell with several variants.


class Held:
    """Batches of one engine that end when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        self.waiting.append(finish)


def times(seconds: float = 0.010) -> ServiceTimes:
    return ServiceTimes((1, 2, 4), (seconds, 1.1 * seconds, 1.2 * seconds), (90.0, 166.0, 285.0))


class Made:
    """A cell with a held engine for each variant."""

    def __init__(self, count: int = 2, streams: int = 1, max_batch: int = 4, clock: Clock | None = None) -> None:
        self.held = [Held() for _ in range(count)]
        config = EngineConfig("openvino", streams=streams, max_batch=max_batch)
        self.engines = [FakeEngine(config, schedule=held.schedule) for held in self.held]
        self.variants = [
            Variant(engine, Profile(times(0.010 / (1 + n))), name=NAMES[n]) for n, engine in enumerate(self.engines)
        ]
        codec = Codec("fake", self.engines[0].signature)
        self.cell = Cell(self.variants, codec, Policy(max_batch=max_batch, queue_bound=1000), clock or WallClock())
        self.by: list[str] = []

    def put(self, images: np.ndarray) -> asyncio.Future[np.ndarray]:
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()

        def reply(result: Result) -> None:
            if isinstance(result, Exception):
                answer.set_exception(result)
                return
            assert self.cell.answering is not None
            self.by.append(self.cell.answering.variant)
            answer.set_result(np.frombuffer(bytes(result[0]), np.float32).reshape(len(images), 3))

        assert not isinstance(
            self.cell.submit(InferRequest(len(images), (memoryview(images.tobytes()),), WANTED), reply), Shed
        )
        return answer

    def climb(self, budget: float, window: int = 1000, drop: float = 0.5, classes: tuple[float, ...] = ()) -> Ladder:
        """Give it a ladder of its variants."""
        plan = Plan(
            Goal(SLO(99, 0.05), AccuracyBudget(budget)),
            tuple(PlanVariant(v.name, f"bundles/{v.name}", "0" * 64, "openvino", "f32") for v in self.variants),
            Policy(max_batch=4),
        ).with_ladder(
            [
                LadderPoint(
                    v.name, 4, 100.0 * (n + 1), 0.9 - n * drop / 2, n * drop, (n * drop, n * drop), classes if n else ()
                )
                for n, v in enumerate(self.variants)
            ],
            window=window,
        )
        self.cell.ladder = ladder = Ladder(self.cell, plan)
        ladder._timer.cancel()  # type: ignore[union-attr]  # the test decides
        return ladder

    async def end(self, number: int) -> None:
        self.held[number].waiting.pop(0)()
        await turns()


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def unique(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_the_next_batch_obeys_and_nothing_that_waits_or_runs_is_lost() -> None:
    async def scenario() -> None:
        made = Made()
        running, waiting = made.put(unique(4, 0)), made.put(unique(3, 1))
        await turns()
        made.cell.use(made.variants[1])
        late = made.put(unique(1, 2))
        await turns()
        assert [len(held.waiting) for held in made.held] == [1, 0], "the stream of the first still computes"
        await made.end(0)
        assert [len(held.waiting) for held in made.held] == [0, 1]
        await made.end(1)
        for answer, images in ((running, unique(4, 0)), (waiting, unique(3, 1)), (late, unique(1, 2))):
            np.testing.assert_array_equal(answer.result(), fake_answers(images))
        assert made.by == ["whole", "half", "half"]
        assert made.cell.totals().of_variant == {"whole": 4, "half": 4}
        assert made.cell.idle

    run(scenario)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_all_engines_together_run_no_more_batches_than_one_has_streams(streams: int) -> None:
    async def scenario() -> None:
        made = Made(3, streams=streams)
        random = np.random.default_rng(streams)
        answers = []
        for step in range(200):
            answers.append((made.put(unique(3, step)), unique(3, step)))
            made.cell.use(made.variants[int(random.integers(3))])
            await turns()
            assert sum(len(held.waiting) for held in made.held) <= streams
            busy = [n for n, held in enumerate(made.held) if held.waiting]
            if busy and random.random() < 0.7:
                await made.end(int(random.choice(busy)))
        while any(held.waiting for held in made.held):
            await made.end(next(n for n, held in enumerate(made.held) if held.waiting))
        for answer, images in answers:
            np.testing.assert_array_equal(answer.result(), fake_answers(images))
        assert all(len(variant.free) == streams for variant in made.variants)

    run(scenario)


def test_a_prediction_is_of_the_variant_that_will_answer() -> None:
    async def scenario() -> None:
        made = Made()
        before = made.cell.profile.seconds(1)
        made.cell.use(made.variants[1])
        assert made.cell.profile.seconds(1) == pytest.approx(before / 2, rel=0.1)
        assert made.cell.batcher.max_batch == 4

    run(scenario)


def test_a_request_larger_than_a_batch_is_computed_by_one_variant() -> None:
    async def scenario() -> None:
        made = Made()
        ladder = made.climb(1.0)
        large = made.put(unique(10, 0))
        await turns()
        small = made.put(unique(1, 1))
        ladder._controller.at = 1
        for _ in range(3):
            await made.end(0)
        assert made.engines[0].batches == [4, 4, 2], "nothing joins its last part"
        await made.end(1)
        assert made.by == ["whole", "half"]
        np.testing.assert_array_equal(large.result(), fake_answers(unique(10, 0)))
        np.testing.assert_array_equal(small.result(), fake_answers(unique(1, 1)))

    run(scenario)


def test_between_two_decisions_the_account_is_kept_too() -> None:
    """100 of 1,000 answers may come from the second; then the first answers, though nothing was decided."""

    async def scenario() -> None:
        made = Made()
        ladder = made.climb(0.05, window=1000)
        ladder._controller.at = 1
        for step in range(60):
            answer = made.put(unique(4, step))
            await turns()
            await made.end(1 if made.held[1].waiting else 0)
            np.testing.assert_array_equal(answer.result(), fake_answers(unique(4, step)))
        assert made.by == ["half"] * 25 + ["whole"] * 35
        totals = made.cell.totals()
        assert (totals.spent, totals.switches) == (pytest.approx(50.0), 2)
        assert "budget" in made.cell.shown()["ladder"]["why"]

    run(scenario)


def test_a_batch_that_fails_costs_nothing() -> None:
    async def scenario() -> None:
        made = Made()
        ladder = made.climb(0.05, window=1000)
        ladder._controller.at = 1
        made.engines[1].fail_next(EngineError("the engine stumbled"))
        answer = made.put(unique(4, 0))
        await turns()
        await made.end(1)
        with pytest.raises(EngineError):
            answer.result()
        assert (ladder.account.spent, ladder.account.share, ladder.account.answers) == (0.0, 0.0, 0)

    run(scenario)


def test_answers_cost_what_their_class_costs() -> None:
    async def scenario() -> None:
        made = Made()
        ladder = made.climb(1.0, drop=0.1, classes=(0.0, 0.0, 0.3))
        ladder._controller.at = 1
        answer = made.put(unique(4, 0))
        await turns()
        assert ladder.account.share == pytest.approx(4 * 0.3 / 1000), "in flight, it may be the dearest class"
        await made.end(1)
        await answer
        assert ladder.account.spent == pytest.approx(4 * 0.3), "the last class is the highest of a fake answer"

    run(scenario)


# A server.


def ladder_plan(
    folder: Path,
    *,
    rates: Sequence[float] = (QUIET_RPS, RUSH_RPS),
    window: int = 100_000,
    budget: float = 0.9,
    **policy: Any,
) -> Plan:
    """A run's folder with a ladder: one variant carries little by its plan, the other any load."""
    names = NAMES[: len(rates)]
    variants, points = [], []
    for name, rate in zip(names, rates, strict=True):
        bundle = tiny_bundle(folder / "bundles" / name, seed=SEEDS[name])
        variants.append(PlanVariant(name, f"bundles/{name}", bundle.manifest.hash, "openvino", "f32"))
        drop = DROPS[name]
        points.append(LadderPoint(name, 8, rate, 0.9 - drop, drop, (drop, drop), measured="the test part"))
    goal = Goal(SLO.parse("p99<500ms"), AccuracyBudget(budget))
    plan = Plan(goal, tuple(variants), Policy(max_batch=8, **policy), model="tiny").with_ladder(points, window=window)
    plan.save(folder / "plan.json")
    return plan


class Crowd(Clients):
    """Clients that ask at a rate, and recognise who answered."""

    def __init__(self, address: tuple[str, int], bundle: Bundle, clients: int = 4) -> None:
        super().__init__(address, clients)
        self.by = dict.fromkeys(NAMES, 0)
        self.pause_s = 0.0
        self._images = unique(1, 5)
        self._length, self._body = encode_request(bundle.manifest.signature, {"image": self._images})
        self._right = {name: tiny_answers(self._images, seed=SEEDS[name]) for name in NAMES}

    def _ask(self) -> None:
        headers = {"Inference-Header-Content-Length": str(self._length)}
        connection = http.client.HTTPConnection(*self._address, timeout=10)
        while not self._stop.is_set():
            try:
                connection.request("POST", "/v2/models/tiny/infer", self._body, headers)
                response = connection.getresponse()
                status, answer = response.status, response.read()
                length = int(response.getheader("inference-header-content-length") or len(answer))
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(error)
                connection.close()
                continue
            given = np.frombuffer(answer[-12:], np.float32)
            who = [
                name for name, right in self._right.items() if status == 200 and np.allclose(given, right, atol=1e-5)
            ]
            label = json.loads(answer[:length]).get("parameters", {}).get("variant")
            if [label] == who:
                self.by[label] += 1
            else:
                self.wrong.append((status, answer))
            self._stop.wait(self.pause_s)
        connection.close()


def active(server: Server) -> set[str]:
    """The variants that answer, of all cells."""
    _, body = get(server.address, "/metrics")
    lines = [line for line in body.decode().splitlines() if line.startswith("rushhour_variant_active{")]
    return {line.partition('variant="')[2].partition('"')[0] for line in lines}


@pytest.fixture
def laddered(tmp_path: Path) -> Path:
    ladder_plan(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_rush_is_answered_by_the_fast_variant_and_what_follows_by_the_accurate_one(laddered: Path) -> None:
    bundle = Bundle.open(laddered / "bundles" / "whole")
    with serving(laddered) as server:
        crowd = Crowd(server.address, bundle)
        crowd.pause_s = 0.4
        with crowd.asking():
            wait_until(lambda: crowd.by["whole"] >= 20)
            assert crowd.by["half"] == 0
            assert active(server) == {"whole"}
            crowd.pause_s = 0.0
            wait_until(lambda: active(server) == {"half"})
            before = crowd.by["half"]
            wait_until(lambda: crowd.by["half"] > before + 200)
            crowd.pause_s = 0.4
            wait_until(lambda: active(server) == {"whole"})
            before = crowd.by["whole"]
            wait_until(lambda: crowd.by["whole"] > before + 5)
        assert not crowd.wrong
        answered = sum(crowd.by.values())
        assert metric(server.address, "rushhour_variant_samples_total") == answered
        assert metric(server.address, "rushhour_variant_switches_total") >= 2
        spent = metric(server.address, "rushhour_accuracy_spent_total")
        assert spent == pytest.approx(DROPS["half"] * crowd.by["half"])
        assert metric(server.address, "rushhour_accuracy_drop_ratio") == pytest.approx(spent / answered)
        shown = json.loads(get(server.address, "/config")[1])
        assert shown["variant"] == "whole"
        assert [point["variant"] for point in shown["ladder"]["points"]] == ["whole", "half"]


def test_fixed_serves_the_first_variant_whatever_comes(laddered: Path) -> None:
    bundle = Bundle.open(laddered / "bundles" / "whole")
    with serving(laddered, ServeSettings(http_port=0, fixed=True)) as server:
        crowd = Crowd(server.address, bundle)
        with crowd.asking():
            wait_until(lambda: crowd.by["whole"] >= 1000)
        assert not crowd.wrong
        assert crowd.by["half"] == 0
        shown = json.loads(get(server.address, "/config")[1])
        assert (shown["ladder"], shown["server"]["fixed"]) == (None, True)


def test_a_reload_in_a_rush_loses_nothing_and_keeps_variant_and_account(laddered: Path) -> None:
    bundle = Bundle.open(laddered / "bundles" / "whole")
    with serving(laddered) as server:
        crowd = Crowd(server.address, bundle)
        with crowd.asking():
            wait_until(lambda: crowd.by["half"] > 300)
            for _ in range(3):
                before = metric(server.address, "rushhour_accuracy_drop_ratio")
                assert load(server.address)[0] == 200
                assert active(server) == {"half"}
                assert metric(server.address, "rushhour_accuracy_drop_ratio") >= 0.9 * before > 0
                count = crowd.by["half"]
                wait_until(lambda count=count: crowd.by["half"] > count + 100)
        assert not crowd.wrong
        spent = metric(server.address, "rushhour_accuracy_spent_total")
        assert spent == pytest.approx(DROPS["half"] * crowd.by["half"])


def test_a_cell_that_is_killed_in_a_rush_comes_back_with_its_ladder(tmp_path: Path) -> None:
    ladder_plan(tmp_path / "run", cells=2)
    bundle = Bundle.open(tmp_path / "run" / "bundles" / "whole")
    with serving(tmp_path / "run", ServeSettings(http_port=0, cells=2)) as server:
        crowd = Crowd(server.address, bundle, clients=6)
        with crowd.asking():
            wait_until(lambda: "half" in active(server))
            first = cells_of(server)
            os.kill(first[0], signal.SIGKILL)
            wait_until(lambda: len(cells_of(server)) == 2 and first[0] not in cells_of(server))
            before = sum(crowd.by.values())
            wait_until(lambda: sum(crowd.by.values()) > before + 300)
        assert len(crowd.wrong) <= 12
        assert all(isinstance(failure, OSError | http.client.HTTPException) for failure in crowd.wrong)
        wait_until(lambda: metric(server.address, "rushhour_cells") >= 2)


def test_a_variant_that_fails_to_load_is_left_out_and_readiness_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ladder_plan(tmp_path / "run", rates=(QUIET_RPS, 1000.0, RUSH_RPS))
    target = open_target(tmp_path / "run")
    half = target.plan.variants[1].bundle_hash
    real = opener(())

    def stumbling(bundle: Bundle, config: EngineConfig) -> Any:
        if bundle.manifest.hash == half:
            raise EngineError("this engine does not run here")
        return real(bundle, config)

    async def scenario() -> None:
        service = Service(target, None, stumbling, exact=False)
        with caplog.at_level(logging.WARNING):
            await service.load()
        loaded = service.loaded
        assert loaded is not None
        assert loaded.missing == ("half",)
        assert "2 of the ladder's 3 variants" in loaded.way
        cell = loaded.cell
        assert isinstance(cell, Cell)
        assert [variant.name for variant in cell.variants] == ["whole", "small"]
        await service.unload()
        exact = Service(target, None, stumbling, exact=True)
        with pytest.raises(EngineError, match="does not run here"):
            await exact.load()

    run(scenario)
    assert "a variant of the ladder is not served" in caplog.text


def test_a_server_without_one_variant_serves_the_others(tmp_path: Path) -> None:
    ladder_plan(tmp_path / "run", rates=(QUIET_RPS, 1000.0, RUSH_RPS))
    model = tmp_path / "run" / "bundles" / "half" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-10])
    bundle = Bundle.open(tmp_path / "run" / "bundles" / "whole")
    with serving(tmp_path / "run", ServeSettings(http_port=0, exact=False)) as server:
        crowd = Crowd(server.address, bundle)
        with crowd.asking():
            wait_until(lambda: crowd.by["small"] > 100)
        assert not crowd.wrong
        assert get(server.address, "/v2/health/ready")[0] == 200
        status, body = get(server.address, "/v2/repository/index", "POST", content_type="application/json")
        assert (status, "without half" in json.loads(body)[0]["reason"]) == (200, True)
        assert metric(server.address, "rushhour_variants_missing") == 1


# Refused before anything is served.


def other_shape(folder: Path) -> Bundle:
    return tiny_bundle(folder, shape=(5, 5, 1))


def other_classes(folder: Path) -> Bundle:
    return tiny_bundle(folder, classes=4)


@pytest.mark.parametrize(("made", "words"), [(other_shape, "signature"), (other_classes, "signature")])
def test_variants_of_different_models_are_no_ladder(tmp_path: Path, made: Callable[[Path], Bundle], words: str) -> None:
    plan = ladder_plan(tmp_path / "run")
    bundle = made(tmp_path / "run" / "bundles" / "half")
    variants = (plan.variants[0], msgspec.structs.replace(plan.variants[1], bundle_hash=bundle.manifest.hash))
    msgspec.structs.replace(plan, variants=variants).save(tmp_path / "run" / "plan.json")
    with pytest.raises(PlanError, match=f"half and whole differ in their {words}") as refused:
        open_target(tmp_path / "run")
    assert "\n" not in str(refused.value)


def test_a_ladder_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rushhour.serve import target

    ladder_plan(tmp_path / "run", cells=2)
    machine = target.describe()
    monkeypatch.setattr(target, "describe", lambda: msgspec.structs.replace(machine, memory_gb=1e-6))
    with pytest.raises(PlanError, match=r"about .* GiB in 2 worker processes"):
        open_target(tmp_path / "run")


def test_drops_of_the_wrong_number_of_classes_are_refused(tmp_path: Path) -> None:
    plan = ladder_plan(tmp_path / "run")
    points = (plan.ladder[0], msgspec.structs.replace(plan.ladder[1], class_drops=(0.0, 0.01)))
    msgspec.structs.replace(plan, ladder=points).save(tmp_path / "run" / "plan.json")
    with pytest.raises(PlanError, match="accuracy drops of 2 classes, and the task has 3"):
        open_target(tmp_path / "run")


def test_a_version_belongs_to_the_whole_ladder(tmp_path: Path) -> None:
    ladder_plan(tmp_path / "run")
    first = open_target(tmp_path / "run").ladder_hash
    plan = ladder_plan(tmp_path / "run", rates=(QUIET_RPS, 1000.0, RUSH_RPS))
    assert open_target(tmp_path / "run").ladder_hash != first != ""
    msgspec.structs.replace(plan, ladder=()).save(tmp_path / "run" / "plan.json")
    assert open_target(tmp_path / "run").ladder_hash == ""
