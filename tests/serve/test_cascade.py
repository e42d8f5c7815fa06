"""A cascade: the small variant answers what it is sure of, the rest goes on; deadlines, failures, clients that go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.utils as triton_utils
from geventhttpclient.response import HTTPParseError
from test_cell import Held, turns
from test_supervisor import cells_of

import rushhour
from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.cascade import CascadeRule, CascadeStep
from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, EngineError, PlanError, ServeError
from rushhour.goal import SLO, Goal
from rushhour.load import discover, is_cascade
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy, Variant
from rushhour.progress import Silent
from rushhour.serve import ServeSettings, open_target
from rushhour.serve.child import ChildServer
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cascade import Cascade
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import LATER, Job, Shed, ShedError
from rushhour.serve.scheduling.lanes import Lanes
from rushhour.serve.scheduling.variant import Variant as Served
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, on_a_timer
from rushhour.wire import Codec, InferRequest, Wanted

Result = Sequence[memoryview] | Exception
RULE = CascadeRule((CascadeStep("small", "top", 1.0, 0.9),), "large", "probabilities")


def small_answers(images: np.ndarray, length: int = 3) -> np.ndarray:
    """Sure of what begins with an even pixel. The second pixel is in the answer, so that no two rows are alike."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    top = np.where(flat[:, 0] % 2 == 0, 0.95, 0.6) + flat[:, 1] / 1e4
    return np.stack([top, 1 - top, np.zeros_like(top)], axis=1).astype(np.float32)


def large_answers(images: np.ndarray, length: int = 3) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    top = 0.9 + flat[:, 1] / 1e4
    return np.stack([np.zeros_like(top), 1 - top, top], axis=1).astype(np.float32)


def expected(images: np.ndarray) -> np.ndarray:
    return RULE.merged((small_answers(images), large_answers(images)))[0]


def pictures(sure: Sequence[bool], seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 256, (len(sure), 4, 4, 1), dtype=np.uint8)
    found[:, 0, 0, 0] = np.where(sure, found[:, 0, 0, 0] & 254, found[:, 0, 0, 0] | 1)
    return found


def times() -> ServiceTimes:
    return ServiceTimes((1, 2, 4), (0.001, 0.0011, 0.0013), (1000.0, 1800.0, 3000.0))


class Stages:
    """A cascade of two fake engines that end their batches when the test says so."""

    def __init__(
        self,
        *,
        deadline_ms: float | None = None,
        queue_bound: int = 100,
        second_bound: int | None = None,
        max_batch: int = 4,
        at_once: bool = False,
        streams: int = 1,
        rule: CascadeRule = RULE,
    ) -> None:
        self.first, self.second = Held(), Held()
        config = EngineConfig("openvino", max_batch=max_batch, streams=streams)

        def engine(held: Held, answers: Callable[[np.ndarray, int], np.ndarray]) -> FakeEngine:
            if at_once:
                return FakeEngine(config, answers=answers, service_s=lambda rows: 1e-4, schedule=on_a_timer)
            return FakeEngine(config, answers=answers, schedule=held.schedule)

        self.small, self.large = engine(self.first, small_answers), engine(self.second, large_answers)
        lanes, codec = Lanes(), Codec("fake", self.small.signature)

        def cell(name: str, engine: FakeEngine, bound: int) -> Cell:
            policy = Policy(max_batch=max_batch, queue_bound=bound, deadline_ms=deadline_ms)
            variants = [Served(engine, Profile(times()), name=name)]
            return Cell(variants, codec, policy, WallClock(), lanes=lanes)

        self.cells = cell("small", self.small, queue_bound), cell("large", self.large, second_bound or queue_bound)
        self.cascade = Cascade(*self.cells, rule, 0, WallClock())


class Asked:
    """A request, and what became of it."""

    def __init__(
        self,
        to: Stages,
        images: np.ndarray,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        status: int | None = None,
    ) -> None:
        self.images = images
        self.results: list[np.ndarray | Exception] = []
        self.status = status
        self.at = 0.0
        wanted = Wanted(id="", outputs=(0,), binary=(True,), timeout_s=timeout_s, priority=priority)
        self.request = InferRequest(len(images), (memoryview(images.tobytes()),), wanted)
        self.job = to.cascade.submit(self.request, self.reply)

    def reply(self, result: Result) -> int | None:
        self.at = time.perf_counter()
        if isinstance(result, Exception):
            self.results.append(result)
        else:
            self.results.append(np.frombuffer(bytes(result[0]), np.float32).reshape(len(self.images), 3))
        return self.status

    def answered(self) -> np.ndarray:
        (result,) = self.results
        assert isinstance(result, np.ndarray)
        return result


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


# Rows go their ways.


def test_sure_rows_are_answered_by_the_small_variant_and_the_rest_goes_on() -> None:
    async def scenario() -> None:
        stages = Stages()
        sure, unsure = Asked(stages, pictures([True], 1)), Asked(stages, pictures([False], 2))
        await turns()
        await stages.first.release()
        np.testing.assert_array_equal(sure.answered(), small_answers(sure.images))
        assert not unsure.results
        assert not stages.cascade.idle
        await stages.second.release()
        np.testing.assert_array_equal(unsure.answered(), large_answers(unsure.images))
        assert stages.cascade.idle
        totals = stages.cascade.totals()
        assert (totals.answered, totals.samples, totals.batches, totals.escalated) == (2, 2, 2, 1)
        assert totals.of_variant == {"small": 2, "large": 1}
        assert sum(totals.request_s.counts) == 2

    run(scenario)


def test_rows_of_one_request_are_merged_in_order() -> None:
    async def scenario() -> None:
        stages = Stages()
        mixed = Asked(stages, pictures([True, False, False, True], 3))
        await turns()
        await stages.first.release()
        assert not mixed.results
        assert stages.large.batches == [2], "only what is not sure goes on"
        await stages.second.release()
        np.testing.assert_array_equal(mixed.answered(), expected(mixed.images))

    run(scenario)


def test_a_request_larger_than_a_batch_is_split_and_merged() -> None:
    async def scenario() -> None:
        stages = Stages(at_once=True, max_batch=4)
        large = Asked(stages, pictures([at % 3 == 0 for at in range(23)], 4))
        small = [Asked(stages, pictures([at % 2 == 0], 5 + at)) for at in range(9)]
        while not all(each.results for each in (large, *small)):
            await asyncio.sleep(0.001)
        for each in (large, *small):
            np.testing.assert_array_equal(each.answered(), expected(each.images))
        assert stages.cascade.totals().escalated == 15 + 4

    run(scenario)


def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async def scenario() -> None:
        stages = Stages(at_once=True, max_batch=4, streams=2, queue_bound=10_000)
        random = np.random.default_rng(7)
        asked = [
            Asked(stages, pictures(random.random(int(random.integers(1, 7))) < 0.5, 100 + at), priority=at % 3)
            for at in range(300)
        ]
        while not all(each.results for each in asked):
            await asyncio.sleep(0.001)
        for each in asked:
            np.testing.assert_array_equal(each.answered(), expected(each.images))
        assert stages.cascade.idle
        assert stages.cascade.totals().answered == 300
        assert all(count == 0 for count in stages.cascade.stood.values())

    run(scenario)


def test_a_batch_is_judged_once_whatever_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    goes_on = CascadeRule.goes_on

    def counting(self: CascadeRule, step: int, outputs: np.ndarray) -> np.ndarray:
        judged.append(len(outputs))
        return goes_on(self, step, outputs)

    monkeypatch.setattr(CascadeRule, "goes_on", counting)

    async def scenario() -> None:
        stages = Stages()
        asked = [Asked(stages, pictures([at % 2 == 0], at)) for at in range(4)]
        stages.cascade.cancel(asked[0].job)  # type: ignore[arg-type]
        await turns()
        await stages.first.release()
        assert judged == [3]
        again = [Asked(stages, pictures([False], 20 + at)) for at in range(2)]
        await turns()
        await stages.second.release()
        await stages.first.release()
        assert judged == [3, 2], "the next batch of the same stream is judged anew"
        await stages.second.release()
        for each in (*asked[1:], *again):
            np.testing.assert_array_equal(each.answered(), expected(each.images))

    run(scenario)


def test_three_variants_are_a_cascade_in_a_cascade() -> None:
    async def scenario() -> None:
        rule = CascadeRule(
            (CascadeStep("small", "top", 1.0, 0.9), CascadeStep("middle", "top", 1.0, 0.95)), "large", "probabilities"
        )

        def middle_answers(images: np.ndarray, length: int = 3) -> np.ndarray:
            flat = images.reshape(len(images), -1).astype(np.float32)
            top = np.where(flat[:, 2] % 2 == 0, 0.97, 0.5)
            return np.stack([1 - top, top, np.zeros_like(top)], axis=1).astype(np.float32)

        config, lanes = EngineConfig("openvino", max_batch=8), Lanes()
        all_answers = (small_answers, middle_answers, large_answers)
        engines = [
            FakeEngine(config, answers=answers, service_s=lambda rows: 1e-4, schedule=on_a_timer)
            for answers in all_answers
        ]
        codec = Codec("fake", engines[0].signature)
        small, middle, large = (
            Cell([Served(engine, Profile(times()))], codec, Policy(max_batch=8), WallClock(), lanes=lanes)
            for engine in engines
        )
        stages = Stages()
        stages.cascade = Cascade(small, Cascade(middle, large, rule, 1, WallClock()), rule, 0, WallClock())
        asked = [Asked(stages, pictures(np.arange(5) % 2 == 0, at)) for at in range(30)]
        while not all(each.results for each in asked):
            await asyncio.sleep(0.001)
        seen = set()
        for each in asked:
            answers, by = rule.merged(tuple(answers(each.images) for answers in all_answers))
            np.testing.assert_array_equal(each.answered(), answers)
            seen |= set(by.tolist())
        assert seen == {0, 1, 2}
        assert stages.cascade.idle

    run(scenario)


# Deadlines, overload, failure: the first answer stands.


def test_a_full_second_stage_leaves_the_first_answer() -> None:
    async def scenario() -> None:
        stages = Stages(second_bound=1)
        asked = [Asked(stages, pictures([False], at)) for at in range(4)]
        await turns()
        await stages.first.release()
        stood = [each for each in asked if each.results]
        assert len(stood) == 3
        for each in stood:
            np.testing.assert_array_equal(each.answered(), small_answers(each.images))
        await stages.second.release()
        totals = stages.cascade.totals()
        assert (totals.answered, totals.shed_queue, totals.failed) == (4, 0, 0), "no client was turned away"
        assert totals.stood["shed"] == 3
        assert totals.errors == {}

    run(scenario)


def test_the_first_answer_is_sent_at_the_deadline_at_the_latest() -> None:
    async def scenario() -> None:
        stages = Stages(deadline_ms=200)
        began = time.perf_counter()
        running, waiting = Asked(stages, pictures([False], 1)), Asked(stages, pictures([False, True], 2))
        short = Asked(stages, pictures([False], 3), timeout_s=0.1)
        await turns()
        await stages.first.release()  # the second stage never ends its batch
        while not (running.results and waiting.results and short.results):
            await asyncio.sleep(0.001)
        for each in (running, waiting, short):
            np.testing.assert_array_equal(each.answered(), small_answers(each.images))
        assert short.at < running.at, "each at its own deadline"
        assert short.at - began >= 0.085
        assert running.at - began >= 0.17
        totals = stages.cascade.totals()
        assert totals.stood["late"] == 3
        assert totals.answered == 3
        await stages.second.release()
        assert [len(each.results) for each in (running, waiting, short)] == [1, 1, 1], "nobody is answered twice"
        assert stages.cascade.idle

    run(scenario)


def test_what_goes_on_keeps_its_absolute_deadline_and_its_priority() -> None:
    async def scenario() -> None:
        stages = Stages(deadline_ms=10_000)
        asked = Asked(stages, pictures([False], 1), timeout_s=5.0, priority=2)
        await turns()
        seen: list[Wanted] = []
        submit = stages.cells[1].submit

        def watched(request: InferRequest, reply: Callable[[Result], int | None]) -> Job | Shed:
            seen.append(request.wanted)
            return submit(request, reply)

        stages.cells[1].submit = watched  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        await stages.first.release()
        (wanted,) = seen
        assert wanted.priority == 2
        assert wanted.timeout_s is not None
        assert 0 < wanted.timeout_s < 4.95, "what is left of its time"
        await stages.second.release()
        assert asked.results

    run(scenario)


def test_an_engine_that_fails_leaves_the_first_answer() -> None:
    async def scenario() -> None:
        stages = Stages()
        for number in range(2):
            stages.large.fail_next(EngineError("the large engine stumbled"))
            asked = Asked(stages, pictures([True, False], number))
            await turns()
            await stages.first.release()
            await stages.second.release()
            np.testing.assert_array_equal(asked.answered(), small_answers(asked.images))
        recovered = Asked(stages, pictures([True, False], 9))
        await turns()
        await stages.first.release()
        await stages.second.release()
        np.testing.assert_array_equal(recovered.answered(), expected(recovered.images))
        totals = stages.cascade.totals()
        assert (totals.answered, totals.failed, totals.stood["failed"]) == (3, 0, 2)

    run(scenario)


def test_by_a_strict_rule_no_first_answer_stands() -> None:
    async def scenario() -> None:
        strict = msgspec.structs.replace(RULE, stands=False)
        stages = Stages(second_bound=1, deadline_ms=150, rule=strict)
        asked = [Asked(stages, pictures([False], at)) for at in range(3)]
        await turns()
        await stages.first.release()
        while not all(each.results for each in asked):
            await asyncio.sleep(0.001)
        assert all(isinstance(each.results[0], ShedError) for each in asked), "two find it full, one is late"
        await stages.second.release()
        stages.large.fail_next(EngineError("the large engine stumbled"))
        failed = Asked(stages, pictures([False], 9))
        await turns()
        await stages.first.release()
        await stages.second.release()
        assert isinstance(failed.results[0], EngineError)
        totals = stages.cascade.totals()
        assert (totals.answered, totals.shed_queue, totals.failed) == (0, 3, 1)
        assert sum(totals.stood.values()) == 0
        assert stages.cascade.idle

    run(scenario)


def test_the_first_engine_failing_is_an_error() -> None:
    async def scenario() -> None:
        stages = Stages()
        stages.small.fail_next(EngineError("the small engine stumbled"))
        asked = Asked(stages, pictures([False], 1))
        await turns()
        await stages.first.release()
        (error,) = asked.results
        assert isinstance(error, EngineError)
        assert stages.cascade.totals().failed == 1
        assert stages.cascade.idle

    run(scenario)


# Clients that leave, answers that are written later, and the end.


def test_a_client_that_leaves_frees_its_place_in_either_stage() -> None:
    async def scenario() -> None:
        stages = Stages(max_batch=1)
        blocking = Asked(stages, pictures([False], 0))
        await turns()
        await stages.first.release()
        waiting = Asked(stages, pictures([False], 1))
        gone = Asked(stages, pictures([False], 2))
        assert isinstance(gone.job, Job)
        await turns()
        assert isinstance(waiting.job, Job)
        stages.cascade.cancel(waiting.job)  # in the queue of the first stage: the core is taken by the second
        await stages.second.release()
        assert blocking.results
        await stages.first.release()
        stages.cascade.cancel(gone.job)  # its batch runs in the second stage
        await stages.second.release()
        assert not waiting.results
        assert not gone.results
        totals = stages.cascade.totals()
        assert (totals.answered, totals.cancelled) == (1, 2)
        assert stages.cascade.idle
        assert not stages.cascade._gone_on

    run(scenario)


def test_an_answer_that_is_written_later_is_counted_when_it_is() -> None:
    async def scenario() -> None:
        stages = Stages()
        asked = Asked(stages, pictures([True, False], 1), status=LATER)
        await turns()
        await stages.first.release()
        await stages.second.release()
        assert len(asked.results) == 1
        assert stages.cascade.totals().answered == 0
        assert not stages.cascade.idle
        stages.cascade.written(asked.request, None)
        assert stages.cascade.totals().answered == 1
        assert stages.cascade.idle

    run(scenario)


def test_a_reply_that_raises_costs_nobody_else_anything() -> None:
    async def scenario() -> None:
        stages = Stages()
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        broken, other = Asked(stages, pictures([False], 1)), Asked(stages, pictures([False], 2))

        def stumbles(result: Result) -> int | None:
            raise RuntimeError("the caller's own fault")

        broken.job.reply.reply = stumbles  # type: ignore[union-attr]
        await turns()
        await stages.first.release()
        await stages.second.release()
        np.testing.assert_array_equal(other.answered(), large_answers(other.images))
        assert [str(error) for error in told] == ["the caller's own fault"]
        assert stages.cascade.idle

    run(scenario)


def test_at_the_end_first_answers_stand() -> None:
    async def scenario() -> None:
        stages = Stages()
        gone_on, waiting = Asked(stages, pictures([False], 1)), None
        await turns()
        await stages.first.release()
        waiting = Asked(stages, pictures([True], 2))
        await turns()
        stages.cascade.abandon(EngineError("the engine does not finish its batches"))
        np.testing.assert_array_equal(gone_on.answered(), small_answers(gone_on.images))
        (error,) = waiting.results
        assert isinstance(error, EngineError)

    run(scenario)


def test_engines_do_not_compute_more_batches_together_than_the_cores_allow() -> None:
    async def scenario() -> None:
        stages = Stages(max_batch=1, streams=2, queue_bound=1000)
        asked = [Asked(stages, pictures([at % 2 == 0], at)) for at in range(40)]
        most = 0
        while not all(each.results for each in asked):
            await turns()
            running = len(stages.first.waiting) + len(stages.second.waiting)
            most = max(most, running)
            assert running <= 2
            held = stages.second if stages.second.waiting else stages.first
            await held.release()
        assert most == 2
        assert stages.cascade.running == (0, 0)

    run(scenario)


def test_what_has_ended_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        stages = Stages(at_once=True, deadline_ms=60_000, queue_bound=10_000)
        for number in range(20):
            asked = [Asked(stages, pictures([False], 50 * number + at)) for at in range(50)]
            while not all(each.results for each in asked):
                await asyncio.sleep(0.001)
        assert not stages.cascade._gone_on
        assert len(stages.cascade._due) <= 200, "entries of a minute do not pile up"
        assert all(entry[2].first_answer is None for entry in stages.cascade._due)

    run(scenario)


# Real engines, real servers.


def bundles_of(run: Path) -> tuple[Bundle, Bundle]:
    return tuple(  # type: ignore[return-value]
        tiny_bundle(run / "bundles" / name, name=name, seed=seed) for name, seed in (("small", 0), ("large", 1))
    )


def rule_of(images: np.ndarray, share: float = 0.5) -> CascadeRule:
    """The rule under which about this share of the images goes on."""
    top = tiny_answers(images, seed=0).max(axis=1)
    return CascadeRule((CascadeStep("small", "top", 1.0, float(np.quantile(top, share))),), "large", "probabilities")


def plan_of(run: Path, rule: CascadeRule, **policy: object) -> Path:
    bundles = {bundle.manifest.name: bundle for bundle in bundles_of(run)}
    variants = tuple(
        Variant(name, f"bundles/{name}", bundles[name].manifest.hash, "openvino", "f32") for name in ("large", "small")
    )
    settings = msgspec.convert({"max_batch": 8, "streams": 2, **policy}, Policy)
    file = run / "plan.json"
    Plan(Goal(SLO(99, 0.05)), variants, settings, cascade=rule, model="tiny").save(file)
    return file


def images_of(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def predicted(rule: CascadeRule, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rule.merged((tiny_answers(images, seed=0), tiny_answers(images, seed=1)))


def clear(images: np.ndarray, rule: CascadeRule) -> np.ndarray:
    """Without those that rounding may send either way."""
    top = tiny_answers(images, seed=0).max(axis=1)
    return images[np.abs(top - rule.steps[0].threshold) > 1e-4]


def ask(client: triton.InferenceServerClient, images: np.ndarray) -> np.ndarray:
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    answer = client.infer("tiny", [tensor]).as_numpy("probabilities")
    assert answer is not None
    return answer


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def config(server: Server) -> dict[str, object]:
    with urllib.request.urlopen(f"{server.url}/config", timeout=10) as answer:
        found: dict[str, object] = json.loads(answer.read())
        return found


@pytest.fixture(scope="module")
def cascaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, CascadeRule]]:
    rule = rule_of(images_of(2000, 0))
    file = plan_of(tmp_path_factory.mktemp("cascade"), rule)
    with serving(file, ServeSettings(http_port=0, grpc_port=0)) as server:
        yield server, rule


def test_every_row_is_answered_as_predicted_offline(cascaded: tuple[Server, CascadeRule]) -> None:
    server, rule = cascaded
    images = clear(images_of(300, 1), rule)
    answers, by = predicted(rule, images)
    assert 0.3 < by.mean() < 0.7
    before = metrics(server)
    with contextlib.closing(triton.InferenceServerClient("{}:{}".format(*server.address))) as client:
        for at in range(60):
            np.testing.assert_allclose(ask(client, images[at : at + 1]), answers[at : at + 1], atol=1e-5)
        np.testing.assert_allclose(ask(client, images[60:]), answers[60:], atol=1e-5)
    after = metrics(server)
    gone_on = 'rushhour_escalated_samples_total{model="tiny"}'
    assert after[gone_on] - before.get(gone_on, 0.0) == by.sum()
    small, large = (f'rushhour_variant_samples_total{{model="tiny",variant="{name}"}}' for name in ("small", "large"))
    assert after[small] - before.get(small, 0.0) == len(images)
    assert after[large] - before.get(large, 0.0) == by.sum()
    assert (
        sum(after[f'rushhour_first_answers_total{{model="tiny",reason="{r}"}}'] for r in ("shed", "late", "failed"))
        == 0
    )


def test_load_says_that_what_is_sent_decides(cascaded: tuple[Server, CascadeRule], tiny: Bundle) -> None:
    """Random values are measured as if they were what users send."""
    server, _ = cascaded

    class Notes(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Notes()
    rushhour.load(server.url, slo="p99<5s", closed_loop=1, duration=0.2, progress=progress)
    assert [note for note in progress.notes if "is a cascade" in note and "--payloads" in note]
    progress = Notes()
    rushhour.load(server.url, slo="p99<5s", closed_loop=1, duration=0.2, payloads=tiny.path, progress=progress)
    assert progress.notes == []
    assert not is_cascade(dataclasses.replace(discover(server.url), tells_speed=False)), "a server of another make"


def test_grpc_and_many_clients_at_once(cascaded: tuple[Server, CascadeRule]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server, rule = cascaded

    def client(number: int) -> None:
        images = clear(images_of(40, 10 + number), rule)
        answers, _ = predicted(rule, images)
        if number % 2:
            with contextlib.closing(triton_grpc.InferenceServerClient(server.grpc)) as over_grpc:
                for at in range(0, len(images), 5):
                    part = images[at : at + 5]
                    tensor = triton_grpc.InferInput("image", list(part.shape), "UINT8")
                    tensor.set_data_from_numpy(part)
                    answer = over_grpc.infer("tiny", [tensor]).as_numpy("probabilities")
                    np.testing.assert_allclose(answer, answers[at : at + 5], atol=1e-5)
        else:
            with contextlib.closing(triton.InferenceServerClient("{}:{}".format(*server.address))) as over_http:
                for at in range(0, len(images), 3):
                    np.testing.assert_allclose(ask(over_http, images[at : at + 3]), answers[at : at + 3], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


def test_the_effective_configuration_shows_the_rule(cascaded: tuple[Server, CascadeRule]) -> None:
    server, rule = cascaded
    assert msgspec.convert(config(server)["cascade"], CascadeRule) == rule


def test_a_reload_with_another_threshold_is_another_version_and_loses_nothing(tmp_path: Path) -> None:
    images = images_of(200, 2)
    rules = [rule_of(images, share) for share in (0.2, 0.8)]
    file = plan_of(tmp_path, rules[0])
    images = clear(clear(images, rules[0]), rules[1])[:40]
    with (
        serving(file) as server,
        contextlib.closing(triton.InferenceServerClient("{}:{}".format(*server.address))) as client,
    ):
        assert client.get_model_metadata("tiny")["versions"] == ["1"]
        np.testing.assert_allclose(ask(client, images), predicted(rules[0], images)[0], atol=1e-5)
        plan_of(tmp_path, rules[1])
        client.load_model("tiny")
        assert client.get_model_metadata("tiny")["versions"] == ["2"]
        np.testing.assert_allclose(ask(client, images), predicted(rules[1], images)[0], atol=1e-5)
        plan_of(tmp_path, rules[0])
        client.load_model("tiny")
        assert client.get_model_metadata("tiny")["versions"] == ["1"], "the version that it had"
        np.testing.assert_allclose(ask(client, images), predicted(rules[0], images)[0], atol=1e-5)


def ask_anew(server: Server, images: np.ndarray) -> np.ndarray:
    """On a connection of its own; again where a process died with it."""
    while True:
        with contextlib.closing(triton.InferenceServerClient("{}:{}".format(*server.address))) as client:
            try:
                return ask(client, images)
            except (OSError, HTTPParseError, triton_utils.InferenceServerException):
                time.sleep(0.01)


def test_worker_processes_add_up_what_went_on_and_answer_alike_when_one_is_killed(tmp_path: Path) -> None:
    images = images_of(400, 3)
    rule = rule_of(images)
    images = clear(images, rule)
    answers, by = predicted(rule, images)
    with serving(plan_of(tmp_path, rule, cells=2, streams=1)) as server:
        for at in range(40):
            np.testing.assert_allclose(ask_anew(server, images[at : at + 1]), answers[at : at + 1], atol=1e-5)
        assert metrics(server)['rushhour_escalated_samples_total{model="tiny"}'] == by[:40].sum()
        first = cells_of(server)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        for at in range(40, 80):
            np.testing.assert_allclose(ask_anew(server, images[at : at + 4]), answers[at : at + 4], atol=1e-5)


# Refused before serving.


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda rule: msgspec.structs.replace(rule, output="logits"), "no output 'logits'"),
        (lambda rule: msgspec.structs.replace(rule, last="medium"), "'medium'"),
    ],
)
def test_a_cascade_that_cannot_be_served_is_refused(
    tmp_path: Path, wrong: Callable[[CascadeRule], CascadeRule], words: str
) -> None:
    file = plan_of(tmp_path, wrong(rule_of(images_of(100, 0))))
    with pytest.raises(PlanError, match=words) as refused:
        open_target(file)
    assert "\n" not in str(refused.value)


def test_variants_of_different_signatures_are_refused(tmp_path: Path) -> None:
    file = plan_of(tmp_path, rule_of(images_of(100, 0)))
    other = tiny_bundle(tmp_path / "bundles" / "small", name="small", shape=(5, 5, 1))
    plan = Plan.load(file)
    large, small = plan.variants
    changed = msgspec.structs.replace(small, bundle_hash=other.manifest.hash)
    msgspec.structs.replace(plan, variants=(large, changed)).save(file)
    with pytest.raises(PlanError, match="small and large differ in their signature"):
        open_target(file)


def test_a_missing_bundle_is_refused_and_the_server_says_why(tmp_path: Path) -> None:

    file = plan_of(tmp_path, rule_of(images_of(100, 0)))
    shutil.rmtree(tmp_path / "bundles" / "small")
    with pytest.raises(BundleError):
        open_target(file)
    with pytest.raises(ServeError, match="small"):
        ChildServer(file, ServeSettings(http_port=0))


def test_a_machine_that_cannot_run_the_small_variant_serves_the_large_one_alone(tmp_path: Path) -> None:
    images = images_of(50, 4)
    file = plan_of(tmp_path, rule_of(images))
    plan = Plan.load(file)
    large, small = plan.variants
    broken = msgspec.structs.replace(small, precision="int8")  # its bundle is not quantised: no engine runs it so
    msgspec.structs.replace(plan, variants=(large, broken)).save(file)
    with pytest.raises(ServeError, match="not quantised"):
        ChildServer(file, ServeSettings(http_port=0))
    with (
        serving(file, ServeSettings(http_port=0, exact=False)) as server,
        contextlib.closing(triton.InferenceServerClient("{}:{}".format(*server.address))) as client,
    ):
        np.testing.assert_allclose(ask(client, images), tiny_answers(images, seed=1), atol=1e-5)
