"""`make bench-doors`: one model of each kind that people bring, from import to a pruned network that is served.

Each model goes through every cell: import, its answers compared with the original's, int8, prune + distil + export,
and a server asked by tritonclient over HTTP and gRPC. A cell works, or says the reason in one line. A row is a part of
the record, so an interrupted run goes on with the next row. Some 15 minutes on 2 cores.

article   the article's script in Keras, and its service with `model.predict` against the Plan of what it saved
own-size  its network at 224 x 224, by shapes
speed     networks from Keras against the same in torch, on OpenVINO; these three need a quiet machine, 40 minutes
bare      `pip install rushhour` alone: size, import, and until a bundle is served; 2 minutes, quiet

Models of TensorFlow are written by the Python that TENSORFLOW_PYTHON names, with TensorFlow and tf2onnx.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bench.article_example import ExampleScale, example, import_speed, own_size
from bench.bare_install import bare_install
from bench.brought import KINDS, Brought, Kind
from bench.environments import CannotInstall
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Record, Table, verdict

import rushhour
from rushhour.bundle import Bundle
from rushhour.data.dataset import Dataset
from rushhour.errors import RushhourError
from rushhour.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "doors.json"
BENCH = ROOT / ".bench"
CELLS = ("import", "equality", "int8", "prune + distil + export", "served")
WORKS, FAULT = "works", "FAULT"
_EQUAL = 1e-3
"""Of the largest answer: more is no rounding."""
_SERVED = 2e-2
_CALIBRATION = 64
_WANTED = 11
_SUM = "sum"


class Scale(ExampleScale, frozen=True):
    """How much of everything; also as `ExampleScale`.

    Attributes:
        rows: the first ones.
        epochs: of distillation.
        starts: of a server of the base install, with each engine.
    """

    rows: int = len(KINDS)
    epochs: int = 2
    starts: int = 9


class Row(msgspec.Struct, frozen=True):
    """What became of one model.

    Attributes:
        cells: cell -> `works`, with a figure where there is one, or why not.
        parameters: before and after pruning.
    """

    cells: dict[str, str]
    parameters: tuple[int, int] = (0, 0)


def row(name: str, scale: Scale) -> Part:
    """One model through every cell, in a process of its own: frameworks do not all get on with each other."""
    kind = KINDS[name]
    if why := _not_here(kind):
        found = Row(dict.fromkeys(CELLS, f"not measured: {why}"))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            found = pool.submit(cells_of, name, scale.epochs).result()
    for cell, said in found.cells.items():
        say(f"  {cell}: {said}")
    return judged_row(name, kind, found)


def _not_here(kind: Kind) -> str:
    """What this machine lacks to write the model; empty where nothing."""
    missing = [each for each in kind.needs if importlib.util.find_spec(each) is None]
    if missing:
        return f"the package {missing[0]} is not installed (extra {kind.extra})"
    if kind.python and not os.environ.get(kind.python):
        return f"{kind.python} names no Python with TensorFlow and tf2onnx"
    return ""


def judged_row(name: str, kind: Kind, found: Row) -> Part:
    """The row with its check: how many of its cells work."""
    working = sum(works(said) for said in found.cells.values())
    refused = "; ".join(f"{cell}: {said}" for cell, said in found.cells.items() if not works(said))
    check = verdict(
        f"1.{name}", f"{kind.origin}: cells that work, of {len(CELLS)}", f">= {len(CELLS)}", working, None, len(CELLS),
        unit="cells", why=refused,
    )  # fmt: skip
    brief = tuple(said if works(said) else "no" for said in found.cells.values())
    before, after = found.parameters
    shrunk = f"{before:,} -> {after:,}" if after else f"{before:,}"
    note = (
        "Small models, written as their users write them. The figure of equality is the largest difference between the "
        "graph's answers and the original's, as a share of the largest answer, in batches of 1, 3 and 8."
    )
    table = Table("What each model goes through", ("model", "origin", *CELLS, "parameters"),
                  ((name, kind.origin, *brief, shrunk),), note)  # fmt: skip
    return Part((check,), (table,), msgspec.to_builtins(found))


def summed(out: Path, scale: Scale) -> Part:
    """How many models go all the way, by the rows in the record."""
    parts = Record.load(out).data["parts"] if out.exists() else {}
    rows = {name: parts[name]["measured"]["cells"] for name in list(KINDS)[: scale.rows] if name in parts}
    whole = [name for name, cells in rows.items() if all(works(said) for said in cells.values())]
    faults = [f"{name} {cell}" for name, cells in rows.items() for cell, said in cells.items() if FAULT in said]
    checks = (
        verdict(
            "1", f"models of {len(rows)} that go all the way to pruned and served", f">= {_WANTED}", len(whole), None,
            len(rows), unit="models", why=f"not {', '.join(name for name in rows if name not in whole)}",
        ),
        verdict(
            "1.faults", "cells that neither work nor say why in one line", "<= 0", len(faults), None,
            len(rows) * len(CELLS), unit="cells", why=", ".join(faults),
        ),
    )  # fmt: skip
    return Part(checks, (), None)


def works(said: str) -> bool:
    """Whether a cell has a result."""
    return said.startswith(WORKS)


def cells_of(name: str, epochs: int) -> Row:
    """One row of the matrix, in this process."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        (folder / "brought").mkdir()
        try:
            brought = KINDS[name].make(folder / "brought")
        except Exception as error:  # any framework may fail in its own way
            return Row(dict.fromkeys(CELLS, f"{FAULT} it could not be written: {type(error).__name__}: {error}"))
        return _cells(KINDS[name], brought, folder, epochs)


def _cells(kind: Kind, brought: Brought, folder: Path, epochs: int) -> Row:
    results: dict[str, Any] = {}

    def imported() -> str:
        results["import"] = rushhour.import_model(
            brought.model, out=folder / "imported", data=brought.dataset, **brought.settings
        )
        why = results["import"].understood.why_untrainable
        return f"{WORKS}, not for training" if why else WORKS

    cells = {"import": _tried(imported)}
    if "import" not in results:
        return Row(cells | dict.fromkeys(CELLS[1:], "not imported"))
    found = results["import"]
    dataset = _as_bundle_takes(brought, found.bundle)
    small: list[Bundle] = []
    work: dict[str, Callable[[], str]] = {
        "equality": lambda: _equality(found),
        "int8": lambda: _int8(found.bundle, dataset, folder / "int8"),
        "prune + distil + export": lambda: _small(kind, found, dataset, folder / "store", epochs, small),
        "served": lambda: _served((small or [found.bundle])[-1]),
    }
    cells |= {cell: _tried(work[cell]) for cell in CELLS[1:]}
    after = small[-1].manifest.parameters if small else 0
    return Row(cells, (found.bundle.manifest.parameters, after))


def _tried(work: Callable[[], str]) -> str:
    try:
        return work()
    except RushhourError as error:
        return str(error)
    except Exception as error:  # this is the fault that the matrix looks for
        return f"{FAULT} {type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1]})"


def _as_bundle_takes(brought: Brought, bundle: Bundle) -> Dataset:
    """The data with the model's classes and scaling."""
    dataset = brought.dataset.with_classes(bundle.manifest.task)
    return dataclasses.replace(dataset, preprocessing=bundle.manifest.preprocessing)


def _equality(found: Any) -> str:
    understood = found.understood
    off = max(understood.from_original or 0.0, understood.difference)
    return f"{WORKS} ({off:.0e})" if off <= _EQUAL else f"{FAULT} answers differ by {off:.2g}"


def _int8(bundle: Bundle, dataset: Dataset, out: Path) -> str:
    from rushhour.compress import quantize

    quantize(bundle, dataset, out, calibration=_CALIBRATION, progress=Silent())
    return WORKS


def _small(kind: Kind, found: Any, dataset: Dataset, store: Path, epochs: int, made: list[Bundle]) -> str:
    from rushhour.compress import Distil, Prune, Recipe, Store, apply

    if found.understood.why_untrainable:
        return str(found.understood.why_untrainable)
    recipe = Recipe((Prune(ratio=kind.ratio, round_to=1, epochs=0), Distil(epochs)))
    *_, last = apply(recipe, found.bundle, dataset, Store(store), progress=Silent())
    made.append(last)
    share = last.manifest.parameters / found.bundle.manifest.parameters
    return f"{WORKS} ({share:.0%} of the parameters)" if share < 1 else "distilled and exported, but nothing was pruned"


def _served(bundle: Bundle) -> str:
    """Ask a real server over HTTP and gRPC, with the client that people have."""
    samples, recorded = bundle.samples(), bundle.answers()
    assert recorded is not None
    with rushhour.serve(bundle, http_port=0, grpc_port=0) as server:
        hosts = {"http": server.url, "grpc": server.grpc_url or ""}
        for protocol, url in hosts.items():
            answers = _asked(protocol, url.partition("://")[2], server.model, samples)
            for name, expected in recorded.items():
                if not np.allclose(answers[name], expected[:3], atol=_SERVED):
                    return f"{FAULT} over {protocol} its answers differ from those in the bundle"
    return WORKS


def _asked(protocol: str, host: str, model: str, samples: Mapping[str, Any]) -> dict[str, Any]:
    package = importlib.import_module(f"tritonclient.{protocol}")
    types = importlib.import_module("tritonclient.utils")
    client = package.InferenceServerClient(host)
    try:
        inputs = []
        for name, array in samples.items():
            given = np.ascontiguousarray(array[:3])
            tensor = package.InferInput(name, list(given.shape), types.np_to_triton_dtype(given.dtype))
            tensor.set_data_from_numpy(given)
            inputs.append(tensor)
        answer = client.infer(model, inputs)
        described = client.get_model_metadata(model, **({"as_json": True} if protocol == "grpc" else {}))
        return {each["name"]: answer.as_numpy(each["name"]) for each in described["outputs"]}
    finally:
        client.close()


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each row."""
    arguments = _arguments(given)
    scale = scale_of(arguments, Scale)
    whole = scale == Scale()
    BENCH.mkdir(exist_ok=True)
    os.environ.setdefault("KERAS_BACKEND", "torch")
    out = Path(arguments.out or (RESULTS if whole else BENCH / "doors-smoke.json"))
    only = {name for name in arguments.only.split(",") if name}
    rows: dict[str, Callable[[], Part]] = {name: partial(row, name, scale) for name in list(KINDS)[: scale.rows]}
    work = Path(arguments.work)
    rows |= {
        "article": partial(example, scale, work / "article", BENCH),
        "own-size": partial(own_size, scale, work / "own-size", BENCH),
        "speed": partial(import_speed, scale, work / "speed", BENCH),
        "bare": partial(bare_install, scale.starts, work / "bare", BENCH),
    }
    try:
        code = run_parts(
            rows, out, kept=whole or arguments.keep, only=only, timed={"article", "own-size", "speed", "bare"},
            seeds={"weights and data": 0},
        )  # fmt: skip
    except CannotInstall as error:
        print(f"Keras: {error}", file=sys.stderr)
        return 1
    if code:
        return code
    return run_parts(
        {**rows, _SUM: partial(summed, out, scale)}, out, kept=True, only={_SUM}, timed=set(),
        seeds={"weights and data": 0},
    )  # fmt: skip


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One model of each kind that people bring, in a matrix.")
    parser.add_argument("--only", default="", help=f"rows, of {','.join(KINDS)}, measured anew; the rest is kept")
    parser.add_argument("--keep", action="store_true", help="keep rows that a run of another scale measured")
    scale_options(parser, Scale())
    parser.add_argument(
        "--work", default=str(BENCH / "doors"), help="folder of the article's pictures, models and runs"
    )
    parser.add_argument("--out", help="the record; by default results/doors.json of a whole run, .bench/ of any other")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
