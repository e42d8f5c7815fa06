"""Ordinary environments: signals, streams, places, limits and users as they are elsewhere. A command works, or says in
one line why it does not; nothing of the user's is touched."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import http.client
import json
import os
import pty
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from runs import load, make_plan, make_run
from test_cli import answer_to, refused

import rushhour
from conftest import Server
from rushhour.api import training
from rushhour.bundle import Bundle
from rushhour.cli import command as cli_command
from rushhour.errors import BundleError, PlanError, StorageError
from rushhour.goal import SLO, Goal
from rushhour.load.verdict import validity
from rushhour.measurement import Accuracy, ClosedLoop, Measurement, ServiceTimes
from rushhour.plan import Plan, Policy, Variant
from rushhour.records.journal import Journal
from rushhour.serve import ServeSettings, open_target
from rushhour.system import faults
from rushhour.system.machine import describe, open_files
from rushhour.testing.bundles import tiny_bundle

NOBODY, OTHER = 54_321, 54_322
"""Users who are in no list: no home, no name."""
SOURCE = str(Path(rushhour.__file__).parents[1])


def environment(**changes: str | None) -> dict[str, str]:
    """This one with some variables changed, or left out where they are None."""
    merged = {**os.environ, "PYTHONPATH": SOURCE, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run(*arguments: str | Path, env: dict[str, str] | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "text": True, "timeout": 150, "stdin": subprocess.DEVNULL} | how
    return subprocess.run(
        [sys.executable, "-m", "rushhour", *map(str, arguments)], env=env or environment(), check=False, **how
    )


def python(code: str, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "text": True, "timeout": 60} | how
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), check=False, **how)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of standard error, where nothing is a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of 8x8 in three classes that can be told apart."""
    file = tmp_path_factory.mktemp("arrays") / "three.npz"
    random, labels = np.random.default_rng(0), np.arange(120, dtype=np.int64) % 3
    brighter = (80 * labels[:, None, None, None]).astype(np.uint8)
    pictures = random.integers(0, 80, (120, 8, 8, 1), dtype=np.uint8) + brighter
    np.savez(file, x=pictures, y=labels)
    return file


def tuned(folder: Path, **policy: Any) -> Path:
    """A run's folder with a plan that serves a tiny bundle."""
    bundle = tiny_bundle(folder / "bundles" / "reference")
    variant = Variant("tiny-f32", "bundles/reference", bundle.manifest.hash, "onnxruntime", "f32")
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(**{"max_batch": 4, **policy}), model="tiny").save(
        folder / "plan.json"
    )
    return folder


# The end.


_BUSY = """
import atexit, sys, threading, time
from rushhour.system import exit
if sys.argv[1] == "leave":
    exit.install()
import torch

class Slow(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1
    @staticmethod
    def backward(context, gradient):
        time.sleep(0.002)
        return gradient

def run():
    while True:
        Slow.apply(torch.ones(2, requires_grad=True)).sum().backward()

threading.Thread(target=run, daemon=True).start()
time.sleep(0.2)
atexit.register(print, "exit handlers ran")
(exit.leave if sys.argv[1] == "leave" else sys.exit)(7)
"""


def test_threads_in_native_code_do_not_abort_the_end() -> None:
    """Python's finalization ends such a thread in the middle of C++: "FATAL: exception not rethrown", exit code 134."""
    done = python(_BUSY, "leave")
    assert (done.returncode, done.stdout, done.stderr) == (7, "exit handlers ran\n", "")


@pytest.mark.parametrize(("code", "ends_with", "says"), [(None, 0, ""), (130, 130, ""), ("why", 1, "why\n")])
def test_the_end_of_a_process_has_its_code(code: object, ends_with: int, says: str) -> None:
    done = python(f"from rushhour.system import exit; exit.install(); exit.leave({code!r})")
    assert (done.returncode, done.stderr) == (ends_with, says)


def test_an_exception_at_the_end_is_a_failure() -> None:
    done = python("from rushhour.system import exit; exit.install(); 1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


# Signals.

_AT_AN_IMPORT = """
import os, signal, sys
_, module, number, *words = sys.argv
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder)
from rushhour.__main__ import main
sys.argv[1:] = words
main()
"""


@pytest.mark.parametrize(
    ("module", "number", "command"),
    [
        ("msgspec", signal.SIGINT, ["machine"]),
        ("click", signal.SIGINT, ["load", "http://127.0.0.1:1"]),
        ("rushhour.cli", signal.SIGTERM, ["report", "x"]),
        ("numpy", signal.SIGHUP, ["train", "mlp", "--data", "x.npz", "--out", "y"]),
        ("msgspec", signal.SIGINT, ["serve", "x"]),
        ("torch", signal.SIGINT, ["train", "mlp", "--data", "x.npz", "--out", "y"]),
        pytest.param("matplotlib", signal.SIGINT, ["report", "run"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_it_is_imported_is_one_line(
    tmp_path: Path, module: str, number: signal.Signals, command: list[str]
) -> None:
    if command == ["report", "run"]:
        make_run(tmp_path / "run")
    done = python(_AT_AN_IMPORT, module, str(int(number)), *command, cwd=tmp_path)
    assert done.returncode == 128 + number, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(r"^rushhour: stopped .*(run it again|continues)", said(done))


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from rushhour.system.interruption import INTERRUPTION\nINTERRUPTION.install()\nINTERRUPTION.begin()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')"
    )
    assert python(code).stdout == "goes on\n"


def test_an_interruption_where_none_can_be_passed_on_comes_again() -> None:
    code = (
        "import os, signal, time\nfrom rushhour.system.interruption import INTERRUPTION\n"
        "INTERRUPTION.install()\nINTERRUPTION.begin()\n"
        "class Lost:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(0)\n"
        "try:\n    Lost()\n    time.sleep(20)\nexcept KeyboardInterrupt:\n    print('ended')"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("ended\n", "")


@contextlib.contextmanager
def started(*arguments: str | Path, **how: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rushhour", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **how,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(holds: Callable[[], bool], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, "SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_training_says_how_to_go_on(
    arrays: Path, tmp_path: Path, number: int, code: int, name: str
) -> None:
    out = tmp_path / "out"
    with started("train", "mlp", "--data", arrays, "--epochs", "100000", "--no-tensorboard", "--out", out) as process:
        until((tmp_path / "out-training" / "curves.jsonl").exists)
        ended, errors = interrupt(process, number)
    assert ended == code, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        f"rushhour: stopped by {name}; the same command continues at its last checkpoint"
    )


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.5])
def test_ctrl_c_while_it_quantises_is_no_fault_of_segmentation(arrays: Path, tmp_path: Path, after_s: float) -> None:
    trained = tmp_path / "trained"
    assert answer_to("train", "mlp", "--data", arrays, "--epochs", "1", "--out", trained).returncode == 0
    command = ["compress", trained, "--data", arrays, "--recipe", "int8", "--out", tmp_path / "small"]
    with started(*command) as process:
        assert process.stderr is not None
        shown = ""
        while "quantize" not in shown:
            shown += (letter := process.stderr.read(1))
            assert letter, shown
        time.sleep(after_s)
        code, errors = interrupt(process)
    assert code == 130, (code, errors)
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        "rushhour: stopped by Ctrl-C; the same command continues, and computes nothing twice"
    )


# Numbers that somebody has edited.


def edited(document: Any, path: str, value: str) -> bytes:
    """The document as JSON, with what stands at a path (`policy.cells`) replaced by this text."""
    *way, last = path.split(".")
    inner = document
    for name in way:
        inner = inner[int(name) if name.isdigit() else name]
    inner[int(last) if last.isdigit() else last] = "HERE"
    return json.dumps(document).replace('"HERE"', value).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy.cells", "100000"),
        ("policy.cells", "0"),
        ("policy.streams", "-1"),
        ("policy.threads", "1e6"),
        ("policy.max_batch", "1e9"),
        ("policy.max_batch", "4097"),
        ("policy.max_batch", "1.5"),
        ("policy.max_batch", '"8"'),
        ("policy.max_batch", "true"),
        ("policy.max_batch", "[8]"),
        ("policy.queue_bound", "1e300"),
        ("policy.deadline_ms", "0"),
        ("policy.deadline_ms", "1e18"),
        ("policy.deadline_ms", "NaN"),
        ("policy.deadline_ms", "1e999"),
        ("goal.slo.percentile", "-1"),
        ("goal.slo.percentile", "100"),
        ("goal.slo.limit_s", "1e30"),
        ("goal.slo.limit_s", "-0.05"),
        ("goal.budget.max_drop", "7"),
        ("goal.workload.rows", "1e9"),
        ("evidence.capacity_rps", "-5"),
        ("evidence.capacity_rps", "1e300"),
        ("evidence.p99_ms", "-1"),
        ("evidence.accuracy_interval", "[0.9]"),
        ("evidence.machine.cores", "0"),
        ("evidence.machine.memory_gb", "-1"),
        ("evidence.parameters", "-3"),
        ("evidence.trials.0.policy.max_batch", "1e9"),
        ("evidence.ladder.1.capacity_rps", "-1"),
        ("schema", "-5"),
        ("schema", '"1"'),
        ("variants", "[]"),
    ],
)
def test_a_number_in_a_plan_is_checked_when_it_is_opened(tmp_path: Path, field: str, value: str) -> None:
    file = tmp_path / "plan.json"
    make_plan().save(file)
    file.write_bytes(edited(json.loads(file.read_text()), field, value))
    with pytest.raises(PlanError) as caught:
        Plan.load(file)
    line = str(caught.value)
    name = field.rpartition(".")[2]
    known = {"percentile": "percentile", "limit_s": "latency limit", "max_drop": "accuracy budget", "rows": "samples"}
    assert name in line or known.get(name, "malformed") in line or "malformed" in line or "out of range" in line
    assert "plan.json" in line
    assert "\n" not in line


def test_such_a_plan_is_one_line_for_every_command(tmp_path: Path) -> None:
    file = tuned(tmp_path) / "plan.json"
    file.write_bytes(edited(json.loads(file.read_text()), "policy.cells", "100000"))
    refused(answer_to("serve", tmp_path), "cells", "256")
    refused(answer_to("serve", file), "cells", "256")
    refused(answer_to("report", tmp_path), "cells", "256")


def test_batches_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(tmp_path, max_batch=4096)
    assert open_target(tmp_path).plan.policy.max_batch == 4096
    small = msgspec.structs.replace(describe(), memory_gb=1e-4)
    monkeypatch.setattr("rushhour.serve.target.describe", lambda: small)
    with pytest.raises(PlanError, match=r"its `max_batch` of 4096 samples needs .* GiB"):
        open_target(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signature.inputs.0.shape.0", "0"),
        ("signature.inputs.0.shape.0", "-4"),
        ("signature.inputs.0.shape.0", "1e12"),
        ("signature.inputs.0.shape", "[65536, 65536]"),
        ("signature.inputs.0.shape", '"4"'),
        ("signature.outputs.0.shape.0", "2.5"),
        ("preprocessing.scale", "1e999"),
        ("preprocessing.scale", "NaN"),
        ("parameters", "-1"),
        ("schema", "0"),
        ("files", '{"model.onnx": {"bytes": -1, "sha256": ""}}'),
        ("tolerance", '{"f32": -1}'),
        ("metrics", '{"test": {"metric": "m", "value": 1, "interval": [0, 1], "n": 0, "split": "test"}}'),
    ],
)
def test_a_number_in_a_bundle_is_checked_when_it_is_opened(tmp_path: Path, field: str, value: str) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    document = json.loads((bundle.path / "bundle.json").read_text())
    (bundle.path / "bundle.json").write_bytes(edited(document, field, value))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path)
    line = str(caught.value)
    assert "its own hash" not in line, "it is looked at before that"
    assert field.partition(".")[0] in line or "malformed" in line or "out of range" in line
    refused(answer_to("serve", bundle.path), "bundle.json cannot be read")


@pytest.mark.parametrize(
    ("reading", "field", "value"),
    [
        (load("int8/openvino/int8/s2t1b32", 4000.0, 7), "reading.rate_rps", "-1"),
        (load("int8/openvino/int8/s2t1b32", 4000.0, 7), "reading.n", "1e30"),
        (load("int8/openvino/int8/s2t1b32", 4000.0, 7), "reading.p50_ms", "NaN"),
        (load("int8/openvino/int8/s2t1b32", 4000.0, 7), "reading.blocks", "[-1]"),
        (ServiceTimes((1, 2), (0.001, 0.002), (1e3, 1e3)), "reading.seconds.0", "-0.001"),
        (ServiceTimes((1, 2), (0.001, 0.002), (1e3, 1e3)), "reading.seconds", "[0.1]"),
        (ServiceTimes((1, 2), (0.001, 0.002), (1e3, 1e3)), "reading.batch_sizes", "[2, 1]"),
        (ServiceTimes((1, 2), (0.001, 0.002), (1e3, 1e3)), "reading.batch_sizes", "[]"),
        (Accuracy("accuracy", 0.9, (0.8, 1.0), 100, "test"), "reading.n", "0"),
        (ClosedLoop(8, 100.0, 0.08), "reading.concurrency", "0"),
        (ClosedLoop(8, 100.0, 0.08), "machine.cores", "1e9"),
    ],
)
def test_a_number_in_a_journal_is_checked_when_it_is_opened(
    tmp_path: Path, reading: Measurement | ServiceTimes | Accuracy | ClosedLoop, field: str, value: str
) -> None:
    journal = Journal(tmp_path / "measurements.jsonl")
    journal.measure("p", "s", "d", type(reading), lambda: reading)  # type: ignore[type-var,arg-type,return-value]
    journal.path.write_bytes(edited(json.loads(journal.path.read_text()), field, value) + b"\n")
    with pytest.raises(StorageError) as caught:
        Journal(journal.path)
    line = str(caught.value)
    assert "line 1" in line
    assert re.sub(r"\.\d+$", "", field).rpartition(".")[2] in line or "malformed" in line


def test_latencies_that_somebody_has_edited_are_one_line(tmp_path: Path) -> None:
    run_ = make_run(tmp_path / "run")
    lines = (run_ / "measurements.jsonl").read_text().splitlines()
    broken = [re.sub(r'"latencies":"[^"]{20}', '"latencies":"AAAA', line) for line in lines]
    (run_ / "measurements.jsonl").write_text("\n".join(broken) + "\n")
    refused(answer_to("report", run_), "latencies", "measurements.jsonl")


@pytest.mark.parametrize(
    "settings",
    ['{"http_port": 70000}', '{"grpc_port": -1}', '{"drain_timeout_s": 1e300}', '{"cells": "2"}', "[]", "{", ""],
)
def test_settings_of_a_server_are_checked(tiny: Bundle, settings: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(settings, type=ServeSettings)
    if settings in ("{", '{"http_port": 70000}'):
        done = subprocess.run(
            [sys.executable, "-m", "rushhour.serve", str(tiny.path), settings],
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 2
        assert "cannot read the settings" in json.loads(done.stdout)["error"]
        assert "Traceback" not in done.stderr


# Streams.

_PRINTS = r"""
import sys
from rushhour.system import streams
streams.install()
import click
from rich.table import Table
from rushhour.cli.terminal import TerminalProgress, result_console
table = Table("\u2605", "\xb5s", title="\u201cp99\u201d \u2265 50 \xb7 \u2713 \u6f22")
table.add_row("\u25a0", "12.5")
for _ in range(int(sys.argv[1])):
    result_console().print(table)
    click.echo("1 \xd7 2 \u2192 \u2026 \u2013 done")
    click.echo(b"bytes")
with TerminalProgress() as progress:
    progress.start("R\xe4der z\xe4hlen")
    progress.done("4 \xb7 \u2713")
error = streams.failure()
print("said" if error is None else error.strerror, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict", "TERM": "dumb"},
    ],
)
def test_output_in_ascii_is_ascii(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRINTS, "1"], capture_output=True, timeout=60, env=environment(**variables), check=False
    )
    assert done.returncode == 0, done.stderr
    out, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert "1 x 2 -> ... - done" in out
    assert '"p99" >= 50' in out
    assert "12.5" in out
    assert "Traceback" not in errors
    assert errors.endswith("said\n")


@pytest.mark.parametrize("encoding", ["latin-1", "cp437", "utf-8"])
def test_output_in_other_encodings(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRINTS, "1"],
        capture_output=True, timeout=60, env=environment(PYTHONIOENCODING=encoding), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout.decode(encoding)
    assert ("漢" in done.stdout.decode(encoding)) == (encoding == "utf-8")


def test_a_file_name_that_is_no_text_is_printed_as_it_is() -> None:
    code = (
        "from rushhour.system import streams\nstreams.install()\nimport click\n"
        "click.echo(b'a\\xff'.decode(errors='surrogateescape'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, b"a\xff\n")


def test_a_full_standard_output_is_said_and_ends_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = python(_PRINTS, "3", stdout=full, capture_output=False, stderr=subprocess.PIPE)
        assert done.returncode == 0
        assert "4" in done.stderr
        assert said(done) == "No space left on device"
        done = run("machine", stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert done.returncode == 2
    expected = "rushhour: cannot write to standard output: No space left on device; all files are complete"
    assert done.stderr.strip() == expected


def test_a_reader_that_has_gone_ends_nothing() -> None:
    """As with `| head -1`; both streams, as with `2>&1 |`."""
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        process = subprocess.Popen(
            [sys.executable, "-c", _PRINTS, "500"], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read() if process.stderr is not None else "said\n"
        assert process.wait(60) == 0, errors
        assert errors.endswith("said\n")
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.parametrize("closed", [pytest.param((1,), marks=pytest.mark.slow), (0, 1, 2)])
def test_streams_that_are_closed_lead_nowhere(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Else the next file that is opened would take what is printed."""
    file = tmp_path / "machine.json"
    redirect = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        f"{sys.executable} -m rushhour machine --json {file} {redirect}",
        shell=True, capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["cores"]


def on_a_terminal(columns: int, *command: str, **variables: str) -> tuple[int, str]:
    """What a terminal of so many columns shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(COLUMNS=None, **variables)
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return process.wait(60), shown.decode()


@pytest.mark.parametrize(("columns", "term"), [(40, "xterm"), (40, "dumb")])
def test_a_narrow_terminal_loses_no_digit(columns: int, term: str) -> None:
    code, shown = on_a_terminal(columns, sys.executable, "-c", _PRINTS, "1", TERM=term)
    assert code == 0, shown
    assert "12.5" in shown
    assert "Traceback" not in shown
    if term == "dumb":
        assert "\x1b" not in shown
        assert "Räder zählen ... " in shown


@pytest.mark.slow
def test_a_report_on_forty_columns(tmp_path: Path) -> None:
    run_ = make_run(tmp_path / "run")
    code, shown = on_a_terminal(40, sys.executable, "-m", "rushhour", "report", str(run_))
    assert code == 0, shown
    assert "9,120" in shown


@pytest.mark.slow
def test_a_report_in_ascii(tmp_path: Path) -> None:
    run_ = make_run(tmp_path / "run")
    done = run("report", run_, env=environment(PYTHONIOENCODING="ascii"), encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert "9,120" in done.stdout
    assert (run_ / "report.html").is_file()


# Places.


def test_places_are_tried_before_work_begins(tmp_path: Path, arrays: Path, tiny: Bundle) -> None:
    """Whatever else is wrong would be said later: data that is missing, a server that nobody runs."""
    (tmp_path / "file").write_text("mine")
    data, url = tmp_path / "none.npz", "http://127.0.0.1:1"
    for place in (Path("/proc/none/x"), tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        for command in (
            ["train", "mlp", "--data", data, "--out", place],
            ["train", "mlp", "--data", data, "--out", tmp_path / "out", "--logs", place],
            ["train", "mlp", "--data", data, "--out", tmp_path / "out", "--json", place],
            ["compress", tiny.path, "--data", data, "--out", place],
            ["compress", tiny.path, "--data", data, "--out", tmp_path / "out", "--steps", place],
            ["tune", "mlp", "--data", data, "--out", place],
            ["demo", "--out", place],
            ["load", url, "--rate", "10", "--json", place],
            ["load", url, "--rate", "10", "--plot", place.with_name(f"{place.name}.html")],
            ["compare", url, url, "--rate", "10", "--json", place],
            ["serve", tmp_path, "--json", place],
            ["machine", "--json", place],
            ["report", tiny.path, "--out", place],
        ):
            refused(answer_to(*command), "cannot write", "too long" if len(place.name) > 255 else " with --")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_where_a_file_is_to_be_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(answer_to("machine", "--json", tmp_path), "it is a folder")
    for out, says in ((tmp_path / "file", "cannot write"), ("/", "cannot write"), (".", "will not write to")):
        refused(answer_to("train", "mlp", "--data", "none.npz", "--out", out), says)
    refused(answer_to("tune", "mlp", "--data", "none.npz", "--out", tmp_path / "file"), "cannot write into")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_device_is_written_to_and_a_link_followed(tmp_path: Path) -> None:
    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "real" / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert answer_to("machine", "--json", pipe).returncode == 0
    assert b"cores" in os.read(reader, 65536)
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert answer_to("machine", "--json", "/dev/null").returncode == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    real.parent.mkdir()
    link.symlink_to(real)
    assert answer_to("machine", "--json", link).returncode == 0
    assert link.is_symlink()
    assert b"cores" in real.read_bytes()


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that any user may enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="rushhour-test-"))
    folder.chmod(0o755)
    yield folder
    for name in folder.rglob("*"):
        if name.is_dir() and not name.is_symlink():
            name.chmod(0o755)
    shutil.rmtree(folder)


def _without_rights() -> None:
    """Root, but what may be read and written goes by the files' modes, as for anybody."""
    libc, drop = ctypes.CDLL(None), 24
    for right in range(4):  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        if libc.prctl(drop, right, 0, 0, 0):
            raise OSError("prctl")


@functools.cache
def another_user() -> dict[str, Any]:
    """How to start a process as a user without rights here; what it may not touch belongs to `OTHER`."""
    if os.geteuid() != 0:
        pytest.skip("only root may become somebody else")
    probe = [sys.executable, "-c", "import rushhour, numpy"]
    variables = environment(HOME=None)
    real: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    with contextlib.suppress(OSError):  # where the interpreter lies in a home that is closed to others
        if not subprocess.run(probe, cwd="/", env=variables, capture_output=True, check=False, **real).returncode:
            return real
    return {"preexec_fn": _without_rights}


def as_another(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(*arguments, cwd=cwd, env=environment(HOME=None, PYTHONDONTWRITEBYTECODE="1"), **another_user())


def give_away(folder: Path) -> None:
    for file in (folder, *folder.rglob("*")):
        os.chown(file, OTHER, OTHER)


def test_a_run_of_another_user_whose_bundles_may_not_be_read(open_place: Path) -> None:
    another_user()
    run_ = tuned(open_place / "run")
    give_away(run_)
    (run_ / "bundles").chmod(0o700)
    done = as_another("serve", run_, cwd=open_place)
    refused(done, "cannot read", "permission is denied")
    (run_ / "bundles").chmod(0o755)
    (run_ / "bundles" / "reference" / "model.onnx").chmod(0o600)
    refused(as_another("serve", run_, cwd=open_place), "model.onnx", "permission is denied")
    run_.chmod(0o700)
    for command in (["serve", run_], ["report", run_], ["report", run_ / "plan.json"], ["serve", run_ / "plan.json"]):
        refused(as_another(*command, cwd=open_place), "permission is denied")


def test_places_of_another_user_are_refused_before_training(open_place: Path) -> None:
    theirs = open_place / "theirs"
    theirs.mkdir()
    another_user()
    give_away(open_place)
    for out in (theirs / "x", open_place / "x"):
        done = as_another("train", "mlp", "--data", "none.npz", "--out", out, cwd=open_place)
        refused(done, "permission is denied", "with --out")


# Open files.


def few_files(number: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def test_too_few_files_are_said_when_it_starts(tmp_path: Path, tiny: Bundle) -> None:
    for command in (["serve", tiny.path, "--http-port", "0", "--no-grpc"], ["load", "http://127.0.0.1:1"]):
        done = run(*command, preexec_fn=few_files(24))
        refused(done, "may open only 24 files", "ulimit -n")


@pytest.mark.parametrize("command", [("tune", "mlp", "--data", "fashion-mnist", "--out", "run"), ("demo",)])
def test_load_tests_with_few_files_are_refused_before_any_work(command: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*command, preexec_fn=few_files(200), cwd=tmp_path)
    refused(done, "may open only 200 files", "ulimit -n")
    assert "quantize" not in done.stderr
    assert "train" not in done.stderr


def test_a_server_with_few_files_answers_or_does_not_start(tiny: Bundle) -> None:
    command = ["serve", tiny.path, "--http-port", "0", "--no-grpc", "--log-format", "json"]
    refused(run(*command, preexec_fn=few_files(64)), "may open only 64 files", "ulimit -n")
    with started(*command, preexec_fn=few_files(128)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(re.findall(r"127\.0\.0\.1:(\d+)", line)[0])
        held = []
        statuses = []
        for _ in range(140):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/v2/health/ready")
                statuses.append(connection.getresponse().status)
            held.append(connection)
        for connection in held:
            connection.close()
        assert statuses[:16] == [200] * 16
        assert set(statuses) == {200, 503}, "what is too much is turned away, not left waiting"
        code, errors = interrupt(process)
    assert code == 0
    fewer = [event for event in map(json.loads, errors.splitlines()) if event["event"] == "fewer connections"]
    assert fewer[0]["connections"] < 128
    assert "ulimit -n" in fewer[0]["why"]


def test_a_soft_limit_is_raised(tiny: Bundle) -> None:
    code = (
        "import resource\nfrom rushhour.system.machine import open_files\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))\n"
        "print(open_files(300)[0])"
    )
    assert python(code).stdout == "300\n"
    files, used = open_files(16)
    assert files >= 16
    assert 3 <= used < files


def test_load_with_few_files_works_or_says_it(server: Server, tmp_path: Path) -> None:
    def loaded(files: int, users: int) -> subprocess.CompletedProcess[str]:
        command = ["load", server.url, "--closed-loop", str(users), "--duration", "1s"]
        return run(*command, preexec_fn=few_files(files))

    done = loaded(64, 4)
    assert done.returncode == 0, done.stderr
    assert "4 users in a closed loop" in done.stdout
    refused(loaded(64, 64), "may open only 64 files", "for 64 connections", "ulimit -n")


def test_why_a_generator_has_few_connections_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validity, "open_files", lambda wanted: (300, 10))
    assert "only 300 files" in validity.file_limit_hint()
    monkeypatch.setattr(validity, "open_files", lambda wanted: (wanted, 10))
    assert validity.file_limit_hint() == ""


# What is said.


def test_a_report_of_a_run_that_may_only_be_read_can_go_elsewhere(tmp_path: Path) -> None:
    run_ = make_run(tmp_path / "run")
    (run_ / "report.html").mkdir()  # which keeps root out, too
    refused(answer_to("report", run_), "report.html", "with --out")
    assert answer_to("report", run_, "--out", tmp_path / "r.html").returncode == 0
    assert (tmp_path / "r.html").read_text().startswith("<!")


def test_a_file_of_a_run_names_it_and_who_only_reads_leaves_its_journal_as_it_is(tmp_path: Path) -> None:
    """The run may be going on, and its last line half written."""
    run_ = make_run(tmp_path / "run")
    with (run_ / "measurements.jsonl").open("ab") as file:
        file.write(b'{"phase":"sea')
    before = (run_ / "measurements.jsonl").read_bytes()
    assert answer_to("report", run_ / "plan.json").returncode == 0
    assert (run_ / "measurements.jsonl").read_bytes() == before
    (run_ / "other.json").write_text("{}")
    refused(answer_to("report", run_ / "other.json"), "is no run")
    refused(answer_to("report", tmp_path / "none" / "plan.json"), "none")


@pytest.mark.parametrize("url", ["https://example.org/data.npz", "s3://bucket/run", "HTTP://x", "hf://a/b"])
def test_a_url_is_no_path(url: str, tmp_path: Path) -> None:
    for command in (
        ["serve", url],
        ["report", url],
        ["train", "mlp", "--data", url, "--out", tmp_path / "x"],
        ["train", url, "--data", "none.npz", "--out", tmp_path / "x"],
        ["train", "mlp", "--data", "none.npz", "--out", url],
        ["compress", url, "--data", "none.npz", "--out", tmp_path / "x"],
        ["load", "http://127.0.0.1:1", "--payloads", url],
        ["machine", "--json", url],
    ):
        refused(answer_to(*command), repr(url), "is a URL, not a path")
    assert not list(tmp_path.iterdir())


def test_a_dash_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of that name was written, which few commands can remove."""
    monkeypatch.chdir(tmp_path)
    refused(answer_to("machine", "--json", "-"), "'-' is no path: write /dev/stdout for standard output")
    refused(answer_to("serve", "-"), "standard input is not read")
    assert not list(tmp_path.iterdir())


def test_a_file_url_says_the_path() -> None:
    refused(answer_to("serve", "file:///data/run"), "write /data/run")


@pytest.mark.slow
def test_a_home_is_found_wherever_a_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(arrays, tmp_path / "three.npz")
    make_run(tmp_path / "run")
    assert answer_to("report", "~/run", "--json=~/report.json").returncode == 0
    assert answer_to("machine", "--json", "~/deep/machine.json").returncode == 0
    command = ["train", "mlp", "--data", "~/three.npz", "--epochs", "1", "--out", "~/nets/mine", "--logs=~/logs"]
    assert answer_to(*command).returncode == 0
    done = answer_to("compress", "~/nets/mine", "--data", "~/none.npz", "--out", "~/x", "--steps", "~/steps")
    refused(done, str(tmp_path / "none.npz"))
    refused(answer_to("serve", "~/nothing"), str(tmp_path / "nothing"))
    refused(answer_to("train", "mlp", "--data", "~no-such-user/x", "--out", "x"), "no home folder", "~no-such-user")
    refused(answer_to("machine", "--json", ""), "not empty")
    names = {file.name for file in tmp_path.iterdir()}
    assert "~" not in names
    assert {"report.json", "deep", "nets", "logs"} <= names


# What nobody foresaw.


Seam = Callable[[BaseException], subprocess.CompletedProcess[str]]


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seam:
    """A training whose data raises; its temporary files lie in a folder of the test's."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def raising(error: BaseException) -> subprocess.CompletedProcess[str]:
        def load_data(spec: str, progress: Any, *_: Any, **__: Any) -> None:
            progress.start(f"Loading {spec}")
            raise error

        monkeypatch.setattr(training, "load_data", load_data)
        return answer_to("train", "mlp", "--data", "x.npz", "--out", tmp_path / "out")

    return raising


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZeroDivisionError("division by\nzero"), "ZeroDivisionError: division by zero"),
        (KeyError("x"), "KeyError: 'x'"),
        (EOFError(), "EOFError"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (RuntimeError("x" * 5000), "RuntimeError: xxx"),
        (RecursionError(), "RecursionError"),
        (MemoryError(), "there is not enough memory"),
        (OSError(28, "No space left on device", "/data/x"), "the disk is full (/data/x)"),
        (OSError(24, "Too many open files"), "this process has too many open files"),
        (ExceptionGroup("several", [ValueError("a")]), "ExceptionGroup: several"),
    ],
)
def test_an_error_that_is_not_ours_is_one_line_and_a_file(
    seam: Seam, tmp_path: Path, error: Exception, says: str
) -> None:
    done = seam(error)
    refused(done, "while loading x.npz: ", says, "its traceback is in ")
    (file,) = (tmp_path / "temporary").glob("rushhour-error-*")
    line = said(done)
    assert str(file) in line
    assert len(line) < 1000
    text = file.read_text()
    assert "Traceback" in text
    assert "load_data" in text
    assert "train mlp --data x.npz" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_no_file_can_be_written_it_says_so(seam: Seam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    monkeypatch.setattr(faults.os, "getcwd", lambda: "/proc/none")
    done = seam(ZeroDivisionError("oh"))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("rushhour: while ")
    assert "ZeroDivisionError: oh" in line
    assert "could not be written to a file" in line
    assert "Traceback" in done.stderr, "it is nowhere else"


def test_errors_elsewhere_say_which_command_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    monkeypatch.setattr(cli_command, "open_files", None)
    refused(answer_to("machine"), "while running rushhour machine: TypeError: 'NoneType' object", "please report")

    def broken(*_: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(cli_command, "open_files", broken)
    done = answer_to("machine")
    refused(done, "AttributeError: no such thing, in your own code (test_environment.py, line ", "its traceback is in ")
    assert "please report" not in done.stderr


# All of it together.


def digest(folder: Path, *but: str) -> dict[str, str]:
    """Of every file below, but of what is the command's own to write."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() + f" {file.stat().st_mtime_ns}"
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not str(file.relative_to(folder)).startswith(but)
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[Path]:
    """A file system of its own in a folder, full of somebody else's file."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _small_shared_memory() -> None:
    """In a name space of its own, /dev/shm holds next to nothing, as in a container."""
    libc, new_namespace, private = ctypes.CDLL(None, use_errno=True), 0x00020000, 1 << 18 | 1 << 14
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None):
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        raise OSError(ctypes.get_errno(), "mount")


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@contextlib.contextmanager
def half_a_core() -> Iterator[Callable[[], None]]:
    """A cgroup with a quota of half a core; what it gives moves a process into it."""
    group = Path("/sys/fs/cgroup") / f"rushhour-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("making a cgroup needs root, and a file system for it")
    try:
        try:
            (group / "cpu.max").write_text("50000 100000")
        except OSError:
            pytest.skip("the quota of a cgroup may not be set here")
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


VERBS = ("train", "compress", "tune", "demo", "serve", "load", "compare", "report", "machine")
WORLDS: dict[str, Sequence[str]] = {
    "a home that may not be written": ("report", "serve", "tune"),
    "no home": ("train", "demo"),
    "ASCII": ("train", "report", "tune", "compare"),
    "no terminal": ("machine", "compare"),
    "40 columns": ("report", "compare"),
    "few files": ("compress", "tune"),
    "tiny shared memory": ("train", "serve"),
    "full disk": ("compress", "report", "load", "tune", "demo", "compare"),
    "small files": ("train", "report", "tune"),
    "full temporary folder": ("train", "report", "tune", "compare"),
    "half a core": ("serve", "load", "machine", "compare"),
    "another user": ("report", "serve", "machine", "tune", "demo"),
}
"""Those commands that a world matters most to: all of them in all worlds with RUSHHOUR_TEST_ALL_WORLDS set. The demo
trains for two epochs whatever its budget, which takes minutes, and is `train`, `tune` and `report` in one."""


@contextlib.contextmanager
def world(name: str, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, str | None]]]:
    """How a process is started in this world: arguments of `subprocess`, and variables."""
    how: dict[str, Any] = {}
    variables: dict[str, str | None] = {}
    with contextlib.ExitStack() as stack:
        match name:
            case "a home that may not be written":
                variables = {"HOME": "/proc/none", "XDG_CACHE_HOME": None}
            case "no home":
                variables = {"HOME": None, "XDG_CACHE_HOME": None, "USER": None, "LOGNAME": None}
            case "ASCII":
                variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
            case "no terminal":
                variables, how = {"TERM": None}, {"start_new_session": True}
            case "40 columns":
                variables = {"COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm"}
            case "few files":
                how = {"preexec_fn": few_files(200)}
            case "tiny shared memory":
                probe = subprocess.run(
                    [sys.executable, "-c", ""], preexec_fn=_quietly(_small_shared_memory), check=False
                )
                if probe.returncode:
                    pytest.skip("a name space of its own needs root")
                how = {"preexec_fn": _small_shared_memory}
            case "small files":
                how = {"preexec_fn": _small_files}
            case "full temporary folder":
                variables = {"TMPDIR": str(stack.enter_context(small_disk(folder / "temporary")))}
            case "half a core":
                how = {"preexec_fn": stack.enter_context(half_a_core())}
            case "another user":
                how = another_user()
                variables = {"HOME": None, "XDG_CACHE_HOME": None, "PYTHONDONTWRITEBYTECODE": "1"}
        yield how, variables


def _quietly(prepare: Callable[[], None]) -> Callable[[], None]:
    def prepared() -> None:
        try:
            prepare()
        except OSError:
            os._exit(1)

    return prepared


@pytest.fixture(scope="module")
def trained(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "mine"
    assert answer_to("train", "mlp", "--data", arrays, "--epochs", "2", "--out", out).returncode == 0
    return out


def _serves(command: Sequence[str | Path], how: dict[str, Any], variables: dict[str, str | None]) -> str:
    """One request to a server in this world; how it ended, in the words of standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rushhour", *map(str, command)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**variables), **how,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.findall(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
        if found:
            connection = http.client.HTTPConnection("127.0.0.1", int(found[0]), timeout=60)
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().status == 200
            connection.close()
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in errors, errors
    assert (process.returncode == 0) == bool(found), errors
    if not found:
        assert (process.returncode, errors.splitlines()[-1][:10]) == (2, "rushhour: "), errors
    return errors


def _walk(name: str, verbs: Sequence[str], open_place: Path, arrays: Path, trained: Path, url: str) -> None:
    """Every verb in one world, on copies that were moved and renamed; all else stays as it is, byte for byte."""
    given = open_place / "given"
    given.mkdir()
    shutil.copy(arrays, given / "three.npz")
    shutil.copytree(trained, given / "renamed bundle")
    tuned(given / "first").rename(given / "moved run")
    make_run(given / "read")
    out = open_place / "out"
    with contextlib.ExitStack() as stack:
        if name == "full disk":
            stack.enter_context(small_disk(out))
        else:
            out.mkdir()
        out.chmod(0o777)
        how, variables = stack.enter_context(world(name, open_place))
        before = digest(given)
        data, bundle = given / "three.npz", given / "renamed bundle"
        half, short = ("--max-accuracy-drop", "50%"), ("--budget", "30s")
        briefly, twin = ("--rate", "50", "--window", "1s", "--blocks", "2"), url.replace("127.0.0.1", "localhost")
        commands: dict[str, list[str | Path]] = {
            "train": ["train", "mlp", "--data", data, "--epochs", "1", "--out", out / "a", "--json", out / "a.json"],
            "compress": ["compress", bundle, "--data", data, "--recipe", "prune:0.3", "--out", out / "b"],
            "tune": ["tune", bundle, "--data", data, *half, *short, "--out", out / "c", "--json", out / "c.json"],
            "demo": ["demo", *short, "--out", out / "d"],
            "load": ["load", url, "--rate", "50", "--duration", "1s", "--slo", "p50<1s", "--json", out / "l.json"],
            "compare": ["compare", url, twin, *briefly, "--slo", "p50<100ms", "--json", out / "e.json"],
            "report": ["report", given / "read", "--out", out / "r.html"],
            "machine": ["machine"],
        }
        if name == "tiny shared memory":
            commands["train"] += ["--workers", "2"]
        for verb in verbs:
            if verb == "serve":
                _serves(["serve", given / "moved run", "--http-port", "0", "--no-grpc"], how, variables)
                continue
            done = run(*commands[verb], env=environment(**variables), cwd=open_place, timeout=600, **how)
            assert "Traceback" not in done.stderr, (verb, done.stderr)
            assert done.returncode in (0, 1, 2), (verb, done.returncode, done.stderr)
            if done.returncode == 2:
                assert said(done).startswith("rushhour: "), (verb, done.stderr)
                assert "which Rushhour does not expect" not in done.stderr, (verb, done.stderr)
            if name not in ("full disk", "small files") and (name, verb) != ("few files", "tune"):
                assert done.returncode != 2, (verb, done.stderr)
            if name == "ASCII":
                assert (done.stdout + done.stderr).isascii()
        assert digest(given) == before


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORLDS)
def test_commands_in_every_world(name: str, open_place: Path, arrays: Path, trained: Path, server: Server) -> None:
    verbs = VERBS if os.environ.get("RUSHHOUR_TEST_ALL_WORLDS") else WORLDS[name]
    _walk(name, verbs, open_place, arrays, trained, server.url)


@pytest.mark.parametrize(
    ("name", "verbs"),
    [pytest.param("another user", ("train",), marks=pytest.mark.slow), ("full disk", ("train",))],
)
def test_the_commands_in_some_worlds(
    name: str, verbs: Sequence[str], open_place: Path, arrays: Path, trained: Path, server: Server
) -> None:
    _walk(name, verbs, open_place, arrays, trained, server.url)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 1.5])
def test_ctrl_c_at_any_time_of_a_load(server: Server, after_s: float) -> None:
    """While the server is asked what it is, while the generator is measured, in the warm-up, in the window."""
    with started("load", server.url, "--rate", "100", "--duration", "10m") as process:
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(after_s)
        code, errors = interrupt(process)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("rushhour: stopped by Ctrl-C; what was measured")
