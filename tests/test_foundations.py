"""The foundations: what is asked for, what is kept on disk and survives harm, how results are judged and predicted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rushhour
from rushhour import errors as errors_module
from rushhour.bundle import Bundle, TensorSpec
from rushhour.capacity import Overhead, ServiceProfile, best_batch, predicted_capacity, simulate
from rushhour.clock import VirtualClock, WallClock
from rushhour.errors import BundleError, DataError, GoalError, PlanError, RushhourError, StorageError, TaskError
from rushhour.goal import SLO, AccuracyBudget, Goal, Workload
from rushhour.measurement import Accuracy, ServiceTimes, latency_curve, pack_latencies
from rushhour.plan import Plan, Policy, Variant
from rushhour.records.journal import Journal
from rushhour.system.machine import _cgroup_quota, cores, describe
from rushhour.system.storage import building, explained, write_whole
from rushhour.task import Task, wilson
from rushhour.testing.bundles import tiny_bundle

SRC = str(Path(rushhour.__file__).parent.parent)


# Errors and the public surface


def test_an_error_is_one_line_with_its_reason_and_remedy() -> None:
    error = DataError("cannot read\nit", "because\tof this", "do that")
    assert str(error) == "cannot read it: because of this; do that"
    assert str(DataError("only this")) == "only this"


def test_names_in_a_users_file_cannot_write_on_the_terminal() -> None:
    hostile = DataError("no column '\x1b]0;mine\x07a\nb'", "half \ud800", "turned \u202eback")
    assert str(hostile) == r"no column '\x1b]0;mine\x07a b': half \ud800; turned \u202eback"
    assert errors_module.one_line("שלום 👩\u200d👩\u200d👧 é") == "שלום 👩\u200d👩\u200d👧 é"


def test_every_error_is_in_the_tree() -> None:
    drawn = errors_module.__doc__ or ""
    for name, kind in vars(errors_module).items():
        if isinstance(kind, type):
            assert name in drawn
            assert issubclass(kind, RushhourError)


def test_all_that_is_exported_is_there() -> None:
    for room in ("", ".data", ".engines", ".testing"):
        module = importlib.import_module(f"rushhour{room}")
        for name in getattr(module, "__all__", ()):
            assert getattr(module, name) is not None


def test_importing_rushhour_loads_nothing_heavy() -> None:
    code = (
        "import sys, rushhour, rushhour.data, rushhour.engines;"
        "print(*[n for n in ('torch', 'openvino', 'onnxruntime', 'onnx', 'nncf', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


# Goals


@given(
    percentile=st.decimals(min_value="0.0001", max_value="99.9999", places=4),
    limit=st.decimals(min_value="0.001", max_value="99999", places=3),
    unit=st.sampled_from(["us", "ms", "s"]),
)
def test_an_slo_reads_what_it_prints(percentile: Any, limit: Any, unit: str) -> None:
    slo = SLO.parse(f"p{percentile}<{limit}{unit}")
    assert SLO.parse(str(slo)) == slo
    assert slo.percentile == float(percentile)
    assert slo.limit_s == pytest.approx(float(limit) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit], abs=1e-9)


@given(st.decimals(min_value=0, max_value=100, places=4))
def test_a_budget_reads_what_it_prints(percent: Any) -> None:
    budget = AccuracyBudget.parse(f"{percent}%")
    assert AccuracyBudget.parse(str(budget)) == budget


@given(st.text(max_size=20))
def test_any_other_text_is_a_goal_error(text: str) -> None:
    for parse in (SLO.parse, AccuracyBudget.parse):
        with contextlib.suppress(GoalError):  # and nothing else
            parse(text)


@pytest.mark.parametrize(
    "text", ["", "p99", "p100<50ms", "p0<50ms", "p99<0ms", "p99<50", "99<50ms", "p99>50ms", "p99<-5ms", "p99<1e3ms"]
)
def test_an_slo_that_cannot_be(text: str) -> None:
    with pytest.raises(GoalError):
        SLO.parse(text)


def test_what_people_type() -> None:
    assert SLO.parse(" P99.9 < 0.2S ") == SLO(99.9, 0.2)
    assert str(SLO.parse("p50<800us")) == "p50<800us"
    assert SLO.parse("p99.9<50ms").allowed_miss_rate == 0.001
    assert str(AccuracyBudget.parse("1%")) == "1%"
    for budget in ("1", "101%", "-1%", "%"):
        with pytest.raises(GoalError):
            AccuracyBudget.parse(budget)
    with pytest.raises(GoalError):
        Workload(rows=0)


# Storage


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    at = tmp_path / "small"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(at)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def own_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    return building(path, ("x",), lambda folder: True)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    write_whole(small_disk / "a", b"old")
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        write_whole(small_disk / "a", bytes(100_000))
    assert (small_disk / "a").read_bytes() == b"old"
    assert names(small_disk) == ["a"]


def test_a_full_disk_keeps_the_old_folder(small_disk: Path) -> None:
    with own_folder(small_disk / "a") as folder:
        (folder / "x").write_bytes(b"old")
    with pytest.raises(StorageError, match="the disk is full"), own_folder(small_disk / "a") as folder:
        (folder / "x").write_bytes(bytes(100_000))
    assert (small_disk / "a" / "x").read_bytes() == b"old"
    assert names(small_disk) == ["a"]


@pytest.mark.parametrize("side", [64, 128])  # the samples do not fit beside the graph; the graph does not fit
def test_a_full_disk_leaves_no_half_bundle(small_disk: Path, side: int) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        tiny_bundle(small_disk / "wide", shape=(side, side, 1))
    assert names(small_disk) == []


def test_a_full_disk_keeps_the_journal_whole(small_disk: Path) -> None:
    journal = Journal(small_disk / "m.jsonl")

    def fill() -> None:
        for number in range(100_000):
            measured(journal, f"{number}")

    with pytest.raises(StorageError, match="the disk is full"):
        fill()
    assert len(journal) > 10
    assert (small_disk / "m.jsonl").read_bytes().endswith(b"\n")
    assert len(Journal(small_disk / "m.jsonl")) == len(journal)


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with own_folder(tmp_path / "a") as folder:
            (folder / "x").write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rushhour.system.storage import building\n"
        "with building(Path(sys.argv[1]), ('x',), lambda folder: True) as folder:\n"
        "    (folder / 'x').write_bytes(b'half'); print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "a").exists()
    assert all(name.startswith(".") for name in names(tmp_path))
    with own_folder(tmp_path / "a") as folder:
        (folder / "x").write_bytes(b"whole")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EIO, "disk")],
)
def test_reasons_are_said(number: int, words: str) -> None:
    with pytest.raises(StorageError, match=rf"cannot write /a: .*{words}"), explained("write /a"):
        raise OSError(number, os.strerror(number))


def test_a_path_through_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        write_whole(tmp_path / "a" / "b" / "c", b"")


# The journal

TIMES = ServiceTimes((1, 2), (0.001, 0.0015), (1000.0, 1333.0))


def measured(journal: Journal, subject: str, take: Callable[[], ServiceTimes] = lambda: TIMES) -> ServiceTimes:
    return journal.measure("search", subject, "seed 0", ServiceTimes, take)


def refuse() -> NoReturn:
    pytest.fail("measured again")


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs" / "m.jsonl")
    assert measured(journal, "a") == TIMES
    assert measured(journal, "a", refuse) == TIMES
    again = Journal(journal.path)
    assert measured(again, "a", refuse) == TIMES
    assert measured(again, "b") == TIMES
    assert [entry.subject for entry in Journal(journal.path)] == ["a", "b"]


def test_a_last_line_that_was_cut_is_dropped_and_measured_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.jsonl")
    for subject in "abc":
        measured(journal, subject)
    whole = journal.path.read_bytes()
    second = whole.rindex(b"\n", 0, -1) + 1
    for cut in (second + 1, second + 20, len(whole) - 1):
        journal.path.write_bytes(whole[:cut])
        resumed = Journal(journal.path)
        assert len(resumed) == 2
        assert journal.path.read_bytes() == whole[:cut], "who only reads writes nothing"
        measured(resumed, "c")
        assert journal.path.read_bytes().startswith(whole[:second])
        assert len(Journal(journal.path)) == 3


@pytest.mark.parametrize("harm", [b"{}", b"", b"\xff", b"[" * 100_000, b'{"y":' + b"[" * 100_000])
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path, harm: bytes) -> None:
    journal = Journal(tmp_path / "m.jsonl")
    for subject in "abc":
        measured(journal, subject)
    lines = journal.path.read_bytes().splitlines()
    journal.path.write_bytes(b"\n".join([lines[0], harm, lines[2]]) + b"\n")
    with pytest.raises(StorageError, match="line 2"):
        Journal(journal.path)


# Plans

PLAN = Plan(Goal(SLO.parse("p99<50ms")), (Variant("a", "bundles/a", "0" * 64, "openvino", "f32"),), Policy(streams=2))


def test_a_plan_comes_back(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 3}, "reads schemas up to 2"),
        ({"schema": None}, "cannot be read"),
        ({"policy": {"streams": 0}}, "cannot be read"),
        ({"variants": []}, "cannot be read"),
        ({"variants": [{"name": "a"}]}, "cannot be read"),
        ({"goal": {"slo": {"percentile": 150, "limit_s": 1}}}, "cannot be read.*150"),
        ({"goal": {"slo": {"percentile": 99, "limit_s": -1}}}, "cannot be read"),
    ],
)
def test_a_plan_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = json.loads(msgspec.json.encode(PLAN)) | change
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=words):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"y":' + b"[" * 100_000, b'{"schema": 1}'])
def test_a_damaged_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "plan.json")


# Bundles


def test_a_bundle_comes_back(tiny: Bundle) -> None:
    opened = Bundle.open(tiny.path)
    assert opened.manifest == tiny.manifest
    assert opened.samples()["image"].shape == (8, 4, 4, 1)
    assert opened.weights is None
    assert opened.model_bytes == opened.model.stat().st_size


def test_a_bundle_of_before_whose_manifest_says_less_is_opened(tmp_path: Path) -> None:
    """A field more in what a manifest may say, and every older bundle was "damaged"."""
    tiny = tiny_bundle(tmp_path / "tiny")
    file = tiny.path / "bundle.json"
    said = json.loads(file.read_bytes())
    said["preprocessing"]["decoding"] = {
        "orientation": "exif", "fit": "stretch", "resampling": "bilinear", "reducing_gap": 2
    }  # fmt: skip
    said["hash"] = ""
    said["hash"] = hashlib.sha256(msgspec.json.encode(said)).hexdigest()
    file.write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=2))
    old = Bundle.open(tiny.path)
    assert old.manifest.hash == said["hash"]
    for name in (None, "other"):
        copy = old.copy_to(tmp_path / "copy", name)
        assert Bundle.open(copy.path).manifest == copy.manifest
    assert old.with_metrics({}).manifest == Bundle.open(tiny.path).manifest
    file.write_bytes(file.read_bytes().replace(b'"stretch"', b'"stretch" ,"more": 1'))
    with pytest.raises(BundleError, match="its own hash"):
        Bundle.open(tiny.path)


def test_equal_work_gives_an_equal_hash(tmp_path: Path, tiny: Bundle) -> None:
    assert tiny_bundle(tmp_path / "again").manifest.hash == tiny.manifest.hash
    assert tiny_bundle(tmp_path / "other", seed=1).manifest.hash != tiny.manifest.hash


@pytest.mark.parametrize("name", ["model.onnx", "samples.safetensors", "bundle.json"])
def test_any_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    bundle = tiny_bundle(tmp_path / "a")
    file = bundle.path / name
    whole = file.read_bytes()
    for at in sorted({0, len(whole) // 3, len(whole) // 2, len(whole) - 2}):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle.path)
        assert caught.value.fix
    for shorter in (whole[:-2], b""):
        file.write_bytes(shorter)
        with pytest.raises(BundleError):
            Bundle.open(bundle.path)
    file.unlink()
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)
    file.write_bytes(whole)
    Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "name", ["../model.onnx", "/etc/passwd", "model.pkl", "model.onnx/../x", "", ".", "bundle.json", "model.onnx\x00"]
)
def test_hostile_file_names_are_refused(tmp_path: Path, name: str) -> None:
    bundle = tiny_bundle(tmp_path / "a")
    content = json.loads((bundle.path / "bundle.json").read_text())
    content["files"][name] = content["files"]["model.onnx"]
    (bundle.path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"schema": 99}, "upgrade Rushhour"), ({"schema": "x"}, "damaged"), ({"files": {}}, "damaged")],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    bundle = tiny_bundle(tmp_path / "a")
    content = json.loads((bundle.path / "bundle.json").read_text()) | change
    (bundle.path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=words):
        Bundle.open(bundle.path)


def test_a_missing_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(BundleError, match="there is no bundle"):
            Bundle.open(path)
    (tmp_path / "bundle.json").write_bytes(b'{"y":' + b"[" * 100_000)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tmp_path)


def test_metrics_are_added_and_sealed(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "a")
    accuracy = Accuracy("accuracy", 0.9, (0.88, 0.92), 1000, "test")
    changed = bundle.with_metrics({"test": accuracy})
    assert Bundle.open(bundle.path).manifest == changed.manifest
    assert changed.manifest.metrics == {"test": accuracy}
    assert changed.manifest.hash != bundle.manifest.hash


def test_a_bundle_without_samples_makes_some_up() -> None:
    bundle = Bundle(Path("nowhere"), msgspec.structs.replace(tiny_manifest(), files={}))
    samples = bundle.samples()["image"]
    assert samples.shape == (8, 4, 4, 1)
    assert samples.dtype == np.uint8
    assert len(np.unique(samples)) > 50


def tiny_manifest() -> Any:
    from rushhour.bundle import Manifest, Signature

    image = TensorSpec("image", "uint8", (4, 4, 1))
    answer = TensorSpec("probabilities", "float32", (3,))
    return Manifest("a", Signature((image,), (answer,)), Task.classification(("a", "b", "c")))


def test_row_bytes() -> None:
    assert TensorSpec("a", "float32", (2, 3)).row_bytes == 24
    assert TensorSpec("a", "uint8", ()).row_bytes == 1


# Tasks


def test_wilsons_interval_has_the_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(successes, n)
        assert found == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0, 1)
    assert wilson(29, 29)[1] == 1


def test_accuracy_and_r2() -> None:
    task = Task.classification(("a", "b"))
    outputs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    value, (low, high) = task.evaluate(outputs, np.array([0, 1, 1, 0]))
    assert value == 0.75
    assert low < value < high
    assert task.read(outputs[1]) == {"b": 0.8, "a": 0.2}
    assert list(task.read(outputs[1])) == ["b", "a"]
    values = Task(kind="regression", outputs=1)
    targets = np.linspace(0, 1, 200)
    assert values.evaluate(targets[:, None], targets)[0] == 1
    noisy = targets + np.random.default_rng(0).normal(0, 0.1, 200)
    value, (low, high) = values.evaluate(noisy[:, None], targets)
    assert low < value < high < 1
    assert value == pytest.approx(1 - ((noisy - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


def test_a_task_refuses_what_does_not_fit() -> None:
    with pytest.raises(TaskError, match="at least two classes"):
        Task.classification(("one",))
    with pytest.raises(TaskError, match="10 outputs"):
        Task.classification(tuple("abcdefghij")).check_output((11,), "model")
    Task(kind="regression", outputs=2).check_output((2,), "model")


@pytest.mark.parametrize(("only_before", "only_after"), [(0.0, 0.0), (0.01, 0.0), (0.03, 0.01), (0.1, 0.1)])
def test_the_interval_of_a_drop_covers_it_as_often_as_it_says(only_before: float, only_after: float) -> None:
    random, task, n = np.random.default_rng(0), Task.classification(("a", "b")), 300
    true, covered, rounds = only_before - only_after, 0, 1000
    targets = np.zeros(n, np.int64)
    for _ in range(rounds):
        fate = random.random(n)
        both_right = (fate > only_before + only_after) & (fate < 0.95)
        before = both_right | (fate < only_before)
        after = both_right | ((fate >= only_before) & (fate < only_before + only_after))
        reference, candidate = (np.stack([right, ~right], axis=1).astype(float) for right in (before, after))
        drop, (low, high) = task.compare(reference, candidate, targets)
        assert drop == pytest.approx(before.mean() - after.mean())
        covered += low <= true <= high
    assert covered / rounds >= 0.935


def test_a_drop_of_r2_is_paired() -> None:
    random, task = np.random.default_rng(0), Task(kind="regression", outputs=2)
    targets = random.normal(size=(400, 2))
    reference = targets + random.normal(0, 0.3, (400, 2))
    candidate = reference + random.normal(0, 0.02, (400, 2))
    drop, (low, high) = task.compare(reference, candidate, targets)
    alone = task.evaluate(reference, targets)[1]
    assert low <= drop <= high
    assert high - low < (alone[1] - alone[0]) / 3  # the noise that both share is gone
    assert drop == pytest.approx(task.evaluate(reference, targets)[0] - task.evaluate(candidate, targets)[0])


# Capacity


def profile(*seconds: float) -> ServiceProfile:
    return ServiceProfile(ServiceTimes(tuple(range(1, len(seconds) + 1)), seconds, tuple(1 / s for s in seconds)))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_stream_without_batches_is_the_known_queue(load: float) -> None:
    # M/D/1: mean wait = load * service / (2 (1 - load)) (Pollaczek, Khinchine)
    service = 0.01
    latencies = simulate(profile(service), streams=1, max_batch=1, rate_rps=load / service, n=200_000, seed=0)
    assert latencies.min() == pytest.approx(service)
    assert latencies.mean() - service == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_batches_are_simulated_as_they_are_served() -> None:
    twice = profile(0.01, 0.012)
    alone = simulate(twice, streams=1, max_batch=1, rate_rps=120, n=5000, seed=0)
    together = simulate(twice, streams=1, max_batch=2, rate_rps=120, n=5000, seed=0)
    assert alone[-1] > 1  # unstable: 120 a second into 100 a second
    assert np.quantile(together, 0.99) < 0.1
    two = simulate(profile(0.01), streams=2, max_batch=1, rate_rps=120, n=5000, seed=0)
    assert np.quantile(two, 0.99) < 0.1


def test_predicted_capacity_lies_where_the_simulation_says() -> None:
    slo = SLO.parse("p99<50ms")
    times = profile(0.01, 0.012, 0.014, 0.016)
    found = predicted_capacity(times, streams=1, max_batch=4, slo=slo)
    assert 100 < found < times.throughput(1, 4) == 250
    for rate, holds in ((found * 0.99, True), (found * 1.03, False)):
        latencies = simulate(times, streams=1, max_batch=4, rate_rps=rate, n=3000, seed=0)
        assert (np.quantile(latencies, 0.99) <= slo.limit_s) == holds
    assert predicted_capacity(times, streams=1, max_batch=4, slo=SLO.parse("p99<5ms")) == 0
    assert predicted_capacity(times, streams=2, max_batch=4, slo=slo) > 1.5 * found


def test_what_serving_takes_is_lost_whole_by_one_stream_of_all_cores_and_shared_by_many() -> None:
    times = ServiceTimes(batch_sizes=(1, 4), seconds=(0.010, 0.016), throughput=(100.0, 250.0))
    profile, slo = ServiceProfile(times), SLO.parse("p99<50ms")
    overhead = Overhead(request_s=0.002)

    def kept(streams: int, overhead: Overhead) -> float:
        alone = predicted_capacity(profile, streams=streams, max_batch=4, slo=slo)
        return predicted_capacity(profile, streams=streams, max_batch=4, slo=slo, overhead=overhead) / alone

    # x = alone (1 - 0.002 x / streams): both lose the same share, because two streams answer twice as much
    assert kept(1, overhead) == pytest.approx(kept(2, overhead), abs=0.05)
    assert kept(1, overhead) < 0.8
    assert kept(1, Overhead(request_s=0.002, spare=1)) == pytest.approx(1, abs=0.02), "an idle core does it"
    full = profile.throughput(2, 4)
    seen = Overhead.from_throughput(profile, streams=2, max_batch=4, spare=0, most_rps=0.7 * full)
    assert 1 / seen.stretch(0.7 * full, 2) == pytest.approx(0.7), "what it was fitted to, it explains"
    assert Overhead.from_throughput(profile, streams=2, max_batch=4, spare=0, most_rps=1.1 * full).request_s == 0


def test_the_best_batch_is_the_smallest_of_those_alike() -> None:
    """As measured with the article's network: from 6 on hardly anything is gained, and 12 make others wait."""
    sizes, seconds = (1, 2, 3, 4, 6, 8, 12), (0.0055, 0.0087, 0.0120, 0.0153, 0.0218, 0.0302, 0.0438)
    times = ServiceTimes(sizes, seconds, tuple(2 * n / s for n, s in zip(sizes, seconds, strict=True)))
    slo = SLO.parse("p99<100ms")
    bound, predicted = best_batch(times, streams=2, slo=slo)
    assert bound == 6
    assert predicted == predicted_capacity(ServiceProfile(times), streams=2, max_batch=6, slo=slo)
    bound, predicted = best_batch(times, streams=2, slo=SLO.parse("p99<3ms"))
    assert (bound, predicted) == (1, 0.0)


def test_a_profile_is_linear_between_what_was_timed() -> None:
    times = ServiceProfile(ServiceTimes((1, 4), (0.01, 0.016), (100, 250)))
    assert [times.seconds(n) for n in (1, 2, 4, 8)] == pytest.approx([0.01, 0.012, 0.016, 0.032])
    noisy = ServiceProfile(ServiceTimes((1, 2), (0.01, 0.009), (100, 222)))
    assert noisy.seconds(2) == 0.01  # a larger batch is never faster


# Machine and measurements


def test_cpu_quotas_are_read(tmp_path: Path) -> None:
    assert _cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("nonsense")
    assert _cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("200000\n")
    assert _cgroup_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_quota(tmp_path) == 2
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert _cgroup_quota(tmp_path) is None


def test_a_quota_on_any_cgroup_above_counts(tmp_path: Path) -> None:
    """A service's quota stands on its slice, not on the root: it was missed."""
    own = tmp_path / "own"
    own.write_text("0::/system.slice/rushhour.service\n")
    folder = tmp_path / "cgroup" / "system.slice" / "rushhour.service"
    folder.mkdir(parents=True)
    assert _cgroup_quota(tmp_path / "cgroup", own) is None
    (folder / "cpu.max").write_text("400000 100000\n")
    assert _cgroup_quota(tmp_path / "cgroup", own) == 4
    (folder.parent / "cpu.max").write_text("200000 100000\n")
    assert _cgroup_quota(tmp_path / "cgroup", own) == 2
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert _cgroup_quota(tmp_path / "cgroup", own) == 2, "what lies above the mount is none of ours"
    own.write_text("0::/../../elsewhere\n")
    assert _cgroup_quota(tmp_path / "cgroup", own) is None


def test_a_quota_counts_in_whole_cores_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for quota, wanted in ((None, 4), (0.5, 1), (1.5, 1), (2.0, 2), (64.0, 4)):
        monkeypatch.setattr("rushhour.system.machine._cgroup_quota", lambda root, quota=quota: quota)
        assert cores() == wanted


def test_the_machine_describes_itself() -> None:
    machine = describe()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.memory_gb > 0
    assert "numpy" in machine.versions
    assert str(machine.cores) in str(machine)


def test_latencies_survive_packing() -> None:
    seconds = np.random.default_rng(0).lognormal(-4, 1, 20_000)
    percentiles = (50.0, 90.0, 99.0, 99.9)
    found = latency_curve(pack_latencies(seconds), percentiles)
    np.testing.assert_allclose(found, np.percentile(seconds, percentiles) * 1e3, rtol=5e-3)
    assert latency_curve(pack_latencies(np.empty(0)), (50.0,)) == [0.0]
    assert latency_curve(pack_latencies(np.array([math.inf])), (50.0,))[0] >= 3_590_000


def test_clocks() -> None:
    clock = VirtualClock(1)
    clock.advance(0.5)
    assert clock.now() == 1.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1)
    assert abs(WallClock().now() - time.monotonic()) < 1
