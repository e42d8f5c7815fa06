"""The verbs as functions: objects or text in, typed results out, nothing printed; in threads, beside an event loop."""

from __future__ import annotations

import asyncio
import functools
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import rushhour
from rushhour import SLO, AccuracyBudget, Bundle, Outcome, RushhourError
from rushhour.api import ClosedLoopResult, LoadResult, Server, Stop, TrainResult
from rushhour.api.inputs import load_data, read_model
from rushhour.api.settings import settings_of
from rushhour.api.values import read_seconds, read_size, read_texts
from rushhour.bundle import Source
from rushhour.errors import (
    BundleError,
    DataError,
    GoalError,
    LoadError,
    ModelError,
    PlanError,
    ServeError,
    StorageError,
)
from rushhour.load import Tick
from rushhour.measurement import Measurement
from rushhour.progress import Silent
from rushhour.serve import ServeSettings
from rushhour.testing import gallery

Arrays = tuple[NDArray[Any], NDArray[Any]]


class Heard(Silent):
    """Progress that keeps what it is given."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.notes: list[str] = []

    def start(self, what: str, total: float | None = None) -> None:
        self.started.append(what)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def rows() -> Arrays:
    """400 samples of two classes that differ by their first number."""
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


@pytest.fixture(scope="module")
def trained(rows: Arrays, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    out = tmp_path_factory.mktemp("api") / "rows"
    return rushhour.train("mlp", rows, out=out, epochs=2, tensorboard=False)


@pytest.fixture
def served(tiny: Bundle) -> Iterator[Server]:
    with rushhour.serve(tiny, http_port=0, grpc_port=0) as server:
        yield server


def test_training_from_arrays_prints_nothing_and_notes_what_was_chosen(
    rows: Arrays, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    result = rushhour.train("mlp", rows, out=str(tmp_path / "out"), epochs=1, tensorboard=False, progress=heard)
    assert capfd.readouterr() == ("", "")
    assert isinstance(result.bundle, Bundle)
    assert Path(result) == tmp_path / "out"
    assert result.logs == tmp_path / "out-training"
    assert (result.plan, result.search) == (None, None)
    assert any("training samples" in note for note in heard.notes)
    assert heard.started
    assert result.as_dict()["hash"] == result.bundle.manifest.hash
    page = rushhour.report(result)
    assert page.file == tmp_path / "out-training" / "report.html"
    assert page.plan is None


def test_a_data_set_a_dictionary_and_a_file_are_the_same_data(rows: Arrays, tmp_path: Path) -> None:
    x, y = rows
    np.savez(tmp_path / "arrays.npz", x=x, y=y)
    found = [
        load_data(data, Silent())
        for data in (rows, {"x": x, "y": y}, tmp_path / "arrays.npz", str(tmp_path / "arrays.npz"))
    ]
    assert len({data.fingerprint for data in found}) == 1
    assert load_data(found[0], Silent()) is found[0]
    for data, how in ((found[0], {"size": "8x8"}), (rows, {"size": (8, 8)}), ((x, y, y), {}), ({"x": x}, {})):
        with pytest.raises(DataError):
            load_data(data, Silent(), **how)


def test_what_a_model_may_be(tiny: Bundle, tmp_path: Path) -> None:
    from rushhour.models import mlp

    source = Source("rushhour.models:mlp", {"inputs": 8, "outputs": 2})
    assert read_model("mlp") == "mlp"
    assert read_model(source) is source
    assert read_model(tiny) is tiny
    for folder in (tiny.path, str(tiny.path)):
        read = read_model(folder)
        assert isinstance(read, Bundle)
        assert read.manifest == tiny.manifest
    assert read_model(mlp) == f"{mlp.__module__}:mlp"
    with pytest.raises(ModelError, match=r"mynet\.build"):
        read_model(lambda: None)
    with pytest.raises(BundleError):
        read_model(tmp_path)
    with pytest.raises(ModelError, match="trained already"):
        rushhour.train(tiny.path, "none.npz", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (torch.nn.Linear(8, 2), r"^cannot use a Linear as a model: "),
        (torch.nn.Sequential(), r"^cannot use a Sequential as a model: "),
        (lambda: torch.nn.Linear(8, 2), r"<lambda> as a model: "),
        (functools.partial(torch.nn.Linear, 8, 2), r"^cannot use a partial as a model: "),
        (None, "^cannot use a NoneType as a model"),
        ("__main__:build", "^cannot use __main__:build as a model"),
    ],
    ids=["network", "empty network", "lambda", "partial", "nothing", "of the script"],
)
def test_what_no_model_can_be_is_named_in_a_line(model: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        read_model(model)
    assert str(refused.value).endswith("pass mynet.build")
    assert len(str(refused.value)) < 300


def test_a_function_that_its_module_no_longer_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network would be built by the name, by another function."""
    old = gallery.residual
    monkeypatch.setattr(sys.modules[old.__module__], "residual", gallery.tutorial)
    with pytest.raises(ModelError, match="has another object of that name"):
        read_model(old)


class Sparse:
    """As scipy's."""

    def toarray(self) -> NDArray[Any]:
        return np.zeros((60, 8))


X8 = np.random.default_rng(0).normal(size=(60, 8))
Y2 = np.arange(60) % 2


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X8.tolist(), Y2.tolist()),
        (torch.tensor(X8, requires_grad=True), torch.tensor(Y2)),
        (torch.tensor(X8).bfloat16(), torch.tensor(Y2).bool()),
        (np.ma.masked_array(X8, False), np.ma.masked_array(Y2, False)),
        (tuple(map(tuple, X8)), ["yes", "no"] * 30),
    ],
    ids=["lists", "gradient", "bfloat16", "nothing masked", "tuples"],
)
def test_arrays_may_be_anything_that_holds_numbers(x: Any, y: Any) -> None:
    data = load_data((x, y), Silent())
    assert (data.sample_shape, data.task.outputs, data.train.inputs.dtype) == ((8,), 2, np.float32)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((np.ma.masked_array(X8, X8 > 2), Y2), "x has [0-9]+ masked values"),
        ((X8, np.ma.masked_array(Y2, Y2 > 0)), "y has 30 masked values"),
        ((Sparse(), Y2), r"x is sparse: .*\.toarray"),
        (([[1.0, 2.0], [3.0]] * 30, Y2), "cannot read x as an array"),
        ((X8, 5), "cannot read y as an array: it is a int"),
        (([X8], [Y2]), "each sample needs one target"),
        ([X8, Y2], r"cannot read data from a list: .*give for example \(x, y\)"),
        (X8, "cannot read data from a ndarray"),
        (None, "cannot read data from a NoneType"),
    ],
    ids=["masked", "masked labels", "sparse", "ragged", "a number", "nested", "list", "array", "none"],
)
def test_data_that_would_lose_something_is_refused(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_data(data, Silent())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("epochs", "3", r"cannot train with epochs='3': Expected `int`, got `str`"),
        ("epochs", 2.5, "epochs=2.5"),
        ("lr", "0.1", "lr='0.1'"),
        ("seed", 1.5, "seed=1.5"),
        ("bf16", "yes", "bf16='yes'"),
        ("augment", 5, "augment=5"),
        ("optimizer", torch.optim.Adam, "optimizer="),
    ],
)
def test_a_setting_of_another_type_is_named(rows: Arrays, tmp_path: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        rushhour.train("mlp", rows, out=tmp_path / "out", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("workers", 0, "cannot train on 0 workers"),
        ("workers", "2", "cannot train on '2' workers"),
        ("parallel", None, "cannot use parallel=None"),
        ("parallel", "foo", "cannot use parallel='foo'"),
        ("pruner", "foo", "cannot use pruner='foo': it is median, hyperband"),
        ("out", None, "cannot use None as a path"),
        ("out", "a\0b", "as a path"),
        ("name", 5, "cannot name a model 5"),
    ],
)
def test_an_argument_that_cannot_be_is_named(rows: Arrays, tmp_path: Path, name: str, value: Any, says: str) -> None:
    with pytest.raises(GoalError, match=says):
        rushhour.train("mlp", rows, **{"out": tmp_path / "out", name: value})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_accuracy_drop", 0.01, "cannot read the accuracy budget '0.01'"),
        ("recipe", [], "there is no recipe"),
        ("recipe", None, "there is no recipe"),
        ("target", "foo", "cannot use target='foo'"),
        ("engine", "torch", "cannot use engine='torch'"),
    ],
)
def test_an_argument_of_compress_is_named(
    tiny: Bundle, rows: Arrays, tmp_path: Path, name: str, value: Any, says: str
) -> None:
    with pytest.raises(GoalError, match=says):
        rushhour.compress(tiny, rows, **{"out": tmp_path / "out", name: value})


def test_a_reference_network_wins_over_a_folder_of_its_name(
    trained: TrainResult, rows: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train mlp --out mlp` could not be repeated: the network was taken for the bundle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlp").mkdir()
    assert read_model("mlp") == "mlp"
    assert read_model("") == ""
    first = rushhour.train("mlp", rows, out="mlp", epochs=1, tensorboard=False)
    again = rushhour.train("mlp", rows, out="mlp", epochs=1, tensorboard=False)
    assert again.bundle.manifest.hash == first.bundle.manifest.hash
    with pytest.raises(ModelError, match="is a bundle: it is trained already"):
        rushhour.train(trained.bundle.path, rows, out="other")


def test_numbers_of_numpy_are_settings() -> None:
    settings = settings_of({"epochs": np.int64(4), "lr": np.float32(0.5), "batch": torch.tensor(8)})
    assert (settings.epochs, settings.lr, settings.batch) == (4, 0.5, 8)
    assert type(settings.epochs) is int


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(GoalError, match="cannot use task='classify': it is classification, multilabel, ranking"):
        load_data((X8, Y2), Silent(), task="classify")


@pytest.mark.parametrize(
    ("value", "seconds"), [("10s", 10), ("2m", 120), ("1h", 3600), ("0.5", 0.5), (3, 3), (2.5, 2.5)]
)
def test_durations(value: str | float, seconds: float) -> None:
    assert read_seconds(value) == seconds


@pytest.mark.parametrize("value", ["", "s", "-1s", "0", "25h", "nan", "inf", "1d", 0, -1, 1e9, float("nan")])
def test_durations_that_cannot_be(value: str | float) -> None:
    with pytest.raises(GoalError, match="duration"):
        read_seconds(value)


@pytest.mark.slow
def test_a_single_text_is_not_taken_for_its_letters(trained: TrainResult, rows: Arrays, tmp_path: Path) -> None:
    assert read_texts("nets:small") == ("nets:small",)
    assert read_texts(["a", "b"]) == ("a", "b")
    with pytest.raises(ServeError, match="given in two ways"):
        rushhour.serve(trained, trust="nets:small", settings=ServeSettings())
    result = rushhour.compress(trained, rows, out=tmp_path / "out", recipe=["w8"], trust="nets:small")
    assert [attempt.recipe for attempt in result.record.attempts] == ["w8"]


def test_sizes() -> None:
    assert read_size("12x16") == read_size((12, 16)) == (12, 16)
    assert read_size(None) is None
    for size in ("12", "12x", "0x4", "4x99999", (3,), (3, 0), (-1, 4)):
        with pytest.raises(GoalError, match="size"):
            read_size(size)


def test_a_result_is_shown_in_a_line(trained: TrainResult) -> None:
    """A notebook shows what the last line of a cell returns."""
    assert re.fullmatch(r"<TrainResult \S+: [\d,]+ parameters, \S+>", repr(trained))
    loaded = LoadResult("http://there", "model", SLO.parse("p50<1s"), "poisson", 1, (), searched=True)
    assert repr(loaded) == f"<LoadResult http://there: {loaded.headline}>"


@pytest.mark.slow
def test_a_bundle_is_compressed(trained: TrainResult, rows: Arrays, tmp_path: Path) -> None:
    result = rushhour.compress(
        trained, rows, out=tmp_path / "small", recipe="f16", max_accuracy_drop=AccuracyBudget(0.5)
    )
    assert result.verdict in ("best", "no gain", "nearest miss")
    assert Path(result) == result.bundle.path == tmp_path / "small"
    assert result.report.is_file()
    assert result.as_dict()["bundle"] == str(tmp_path / "small")


def test_a_bundle_is_not_replaced_by_its_own_compression(trained: TrainResult, rows: Arrays, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(trained.bundle.path)
    for out in (trained.bundle.path, tmp_path / "link"):
        with pytest.raises(StorageError, match="it is the bundle that is compressed, and would be lost"):
            rushhour.compress(trained, rows, out=out, recipe="w8", force=True)


def test_pictures_on_another_scale_than_in_training_are_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((60, 8, 8, 3))
    result = rushhour.train("mlp", (x, Y2), out=tmp_path / "out", epochs=1, tensorboard=False)
    load_data((x, Y2), Silent(), result.bundle)
    with pytest.raises(DataError, match=r"values up to 25[45].*: out was trained on pictures with values up to [01]"):
        load_data((x * 255, Y2), Silent(), result.bundle)


def test_a_bundle_that_was_moved_has_no_report(tiny: Bundle, tmp_path: Path) -> None:
    bundle = tiny.copy_to(tmp_path / "moved")
    with pytest.raises(PlanError, match=r"nothing to report of the bundle .*moved-training or moved-steps beside it"):
        rushhour.report(bundle)


def test_a_server_is_a_process_of_its_own(tiny: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    log = tmp_path / "server.log"
    server = rushhour.serve(str(tiny.path), http_port=0, grpc_port=None, log_file=log)
    try:
        assert server.is_running
        assert server.url.startswith("http://127.0.0.1:")
        assert server.grpc_url is None
        assert server.model == tiny.manifest.name
        assert str(server) == server.url
        assert "streams" in server.way
        assert rushhour.load(server, rate=300, duration=1, slo="p50<50ms").windows
    finally:
        server.close()
    assert not server.is_running
    server.close()
    assert log.stat().st_size
    assert capfd.readouterr() == ("", "")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_a_server_cannot_do_is_an_error(tiny: Bundle, served: Server, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing to serve"):
        rushhour.serve(tmp_path)
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(ServeError, match=str(port)):
        rushhour.serve(tiny, http_port=port, grpc_port=None)
    with pytest.raises(ServeError, match="two ways"):
        rushhour.serve(tiny, http_port=0, settings=ServeSettings())
    with rushhour.serve(tiny, settings=ServeSettings(http_port=0, model="other")) as server:
        assert server.model == "other"


@pytest.mark.slow
def test_load_gives_a_verdict(served: Server, capfd: pytest.CaptureFixture[str]) -> None:
    windows: list[Measurement] = []
    ticks: list[Any] = []
    result = rushhour.load(
        served,
        slo=SLO.parse("p50<50ms"),
        rate=[100, "120"],
        duration="1s",
        seed=7,
        on_window=windows.append,
        on_tick=ticks.append,
    )
    assert [window.rate_rps for window in result.windows] == [100, 120]
    assert list(result.windows) == windows
    assert ticks
    assert result.outcome in Outcome
    assert result.headline.endswith("rates keep p50<50ms")
    assert (result.seed, result.arrivals, result.stopped) == (7, "poisson", "")
    assert {"outcome", "slo", "url", "runs", "partial"} <= result.as_dict().keys()
    if served.grpc_url:
        assert rushhour.load(served.grpc_url, rate=300, duration=1, slo="p50<50ms").model == served.model
    closed = rushhour.load(served, closed_loop=2, duration=0.5)
    assert isinstance(closed, ClosedLoopResult)
    assert closed.result.throughput_rps > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"slo": "p99"}, GoalError),
        ({"rate": 0}, GoalError),
        ({"rate": "many"}, GoalError),
        ({"rate": "recorded"}, GoalError),
        ({"rate": 10, "duration": "soon"}, GoalError),
        ({"rate": 10, "closed_loop": 3}, GoalError),
        ({"rate": 10, "arrivals": "sometimes"}, LoadError),
        ({"rate": 10, "shapes": "image"}, LoadError),
        ({"rate": 10}, LoadError),
    ],
)
def test_a_load_that_cannot_be_is_an_error(how: dict[str, Any], kind: type[RushhourError]) -> None:
    with pytest.raises(kind):
        rushhour.load("http://127.0.0.1:1", **how)


def test_a_load_is_stopped_from_another_thread(served: Server) -> None:
    stop = Stop()

    def see(tick: Tick) -> None:
        if tick.sent > 300:  # of which up to 200 warm up
            threading.Thread(target=stop.request).start()

    result = rushhour.load(served, rate=100, duration="10m", slo="p50<50ms", stop=stop, on_tick=see)
    assert result.stopped == "stopped by the caller"
    assert not result.holds
    assert "partial" in result.headline
    assert len(result.windows) == 1
    assert not stop.request(), "nothing is in flight"


def test_a_load_that_is_stopped_before_it_measured_anything_is_an_error(served: Server) -> None:
    """It was a KeyboardInterrupt, which ends the program of the caller."""
    stop = Stop()
    stop.request()
    for begin in (
        lambda: rushhour.load(served, rate=100, stop=stop),
        lambda: rushhour.load(served, stop=stop),
        lambda: rushhour.load(served, closed_loop=2, duration=1, stop=stop),
        lambda: rushhour.compare([served.url, f"{served.url}/"], rate=50, stop=stop),
    ):
        with pytest.raises(LoadError, match="stopped by the caller: nothing was measured until then"):
            begin()


@pytest.mark.slow
def test_servers_are_compared(served: Server, tiny: Bundle) -> None:
    with rushhour.serve(tiny, http_port=0, grpc_port=None) as other:
        result = rushhour.compare([served, other.url], rate=300, window=0.5, blocks=2, slo="p50<50ms")
    assert result.comparison.servers == (served.url, other.url)
    assert result.as_dict()["slo"] == "p50<50ms"
    with pytest.raises(LoadError, match="two or more"):
        rushhour.compare([served], rate=50)


def test_verbs_work_in_a_thread_beside_a_running_event_loop(served: Server, rows: Arrays, tmp_path: Path) -> None:
    """As in a notebook, whose cells run inside an event loop."""

    async def cell() -> tuple[Any, Any]:
        here = rushhour.load(served, rate=300, duration=1, slo="p50<50ms")
        there = await asyncio.to_thread(rushhour.train, "mlp", rows, out=tmp_path / "out", epochs=1, tensorboard=False)
        return here, there

    loaded, trained = asyncio.run(cell())
    assert loaded.windows
    assert Path(trained).is_dir()
