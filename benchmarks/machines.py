"""`make bench-machines`: the same networks on each class of machine that this one can be.

restrict  what hides an instruction set from each library: its own variable, and the auditor of rushhour.testing
int8      accuracy and speed of int8 with 7 and with 8 bits of the weights, on both engines, with and without VNNI

The networks are trained on Fashion-MNIST (.bench/machines; not trained again). A class that this processor does not
have is shown by a child process that sees no instruction set above AVX2 (`python -m rushhour.testing.processor`): it
computes what such a processor computes, on this one's clock. Where the processor has no VNNI itself, there is only one
class to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from bench.networks import SEED, quantised, trained
from bench.parts import Part, run_parts, say
from bench.record import Check, Table, verdict

from rushhour.bundle import Bundle
from rushhour.data import load
from rushhour.system.machine import describe
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.processor import VARIABLES, restricted

RESULTS = Path(__file__).parent / "results" / "machines.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench" / "machines"
NETWORKS = ("article", "residual", "mlp")
ENGINES = ("openvino", "onnxruntime")
_BITS = {"7 bits": "any", "8 bits": "vnni"}
_ALLOWED = "<= 0.3"
_HERE = str(Path(__file__).resolve())


class Scale(msgspec.Struct, frozen=True):
    """How much is measured: epochs of training, blocks and seconds of a comparison of speed."""

    epochs: int = 2
    blocks: int = 8
    seconds: float = 0.3


# In a child, as the machine that it sees.


def seen() -> dict[str, str]:
    """What each library makes of the processor, by its own word or by what it computes."""
    import onnxruntime
    import openvino
    import torch

    import rushhour.engines as engines
    from rushhour.records.answers import deviation

    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    found = {
        "numpy": "AVX-512" if features["AVX512F"] else "AVX2",
        "torch, own kernels": torch.backends.cpu.get_cpu_capability(),
        "torch, oneDNN": "AVX-512" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "AVX2",
        "openvino, bf16": str("BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
    }
    # A bundle that saturates without VNNI, opened without any of our checks: what comes shows which kernels run.
    careless = msgspec.structs.replace(describe(), features=("avx512_vnni",))
    mock.patch.object(engines.agreement, "describe", return_value=careless).start()
    mock.patch.object(engines, "check_answers", return_value=None).start()
    bundle = Bundle.open(BENCH / "saturating")
    for engine in ENGINES:
        opened = engines.open_engine(bundle, engines.EngineConfig(engine, "int8", max_batch=8))  # type: ignore[arg-type]
        recorded = bundle.answers()
        assert recorded is not None
        off = deviation(recorded, engines.Runner(opened).infer(bundle.samples()))
        opened.close()
        found[f"{engine}, int8"] = "saturates" if off > 0.05 else "does not saturate"
    assert onnxruntime.__version__
    return found


def measure(network: str, scale: Scale) -> dict[str, Any]:
    """Every form of one network on both engines: accuracy on the test part, and speed over f32."""
    from rushhour.compress import bench_artefacts, outputs_of
    from rushhour.engines import EngineConfig
    from rushhour.errors import EngineError
    from rushhour.system.machine import cores

    data = load("fashion-mnist")
    forms = {"f32": BENCH / network, **{form: BENCH / f"{network}-{form[0]}" for form in _BITS}}
    found: dict[str, Any] = {"class": describe().isa}
    for engine in ENGINES:
        artefacts: dict[str, Any] = {}
        for form, path in forms.items():
            bundle = Bundle.open(path)
            config = EngineConfig(engine, bundle.manifest.precision, streams=cores(), max_batch=32)  # type: ignore[arg-type]
            try:
                outputs = outputs_of(bundle, config, data.test)
            except EngineError as error:
                found[f"{engine} {form}"] = {"refused": str(error)}
                continue
            artefacts[form] = (bundle, config)
            found[f"{engine} {form}"] = {
                "accuracy": data.task.evaluate(outputs, data.test.targets)[0],
                "right": (outputs.argmax(1) == data.test.targets).astype(int).tolist(),
            }
        parent = artefacts.pop("f32")
        speeds = bench_artefacts(parent, artefacts, blocks=scale.blocks, seconds=scale.seconds)
        for form, speed in speeds.items():
            ratio = speed.throughput
            found[f"{engine} {form}"] |= {"speed": [ratio.value, ratio.low, ratio.high], "per_s": speed.samples_per_s}
            found[f"{engine} f32"]["per_s"] = speed.parent_samples_per_s
    return found


# Here.


def _child(*arguments: str, environment: Mapping[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", _HERE, *arguments], env=dict(environment), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def restrict() -> Part:
    """What it takes to hide AVX-512 and VNNI from each library."""
    tiny_bundle(BENCH / "saturating", shape=(16, 16, 1), classes=8, precision="int8", weight_bits=8)
    ways = {
        "as it is": dict(os.environ),
        "the variables": {**os.environ, **VARIABLES},
        "the auditor": restricted(),
    }
    found = {way: _child("--seen", environment=environment) for way, environment in ways.items()}
    rows = tuple((name, *(found[way][name] for way in ways)) for name in found["as it is"])
    note = f"The variables: {' '.join(f'{name}={value}' for name, value in VARIABLES.items())}. The auditor is "
    note += (
        "`python -m rushhour.testing.processor COMMAND`: it answers the `cpuid` instructions of all these libraries."
    )
    table = Table("What each library makes of this processor", ("library", *ways), rows, note)
    wanted = {"numpy": "AVX2", "torch, own kernels": "AVX2", "torch, oneDNN": "AVX2", "openvino, bf16": "False"}
    wanted |= {f"{engine}, int8": "saturates" for engine in ENGINES}
    escaped = [name for name, value in wanted.items() if found["the auditor"][name] != value]
    what = "libraries that still see more than AVX2 under the auditor"
    check = verdict("1.restricted", what, "<= 0", len(escaped), None, len(wanted), unit="libraries")
    return Part((check,), (table,), found)


def int8(scale: Scale) -> Part:
    """Accuracy and speed of each form on each class."""
    data = load("fashion-mnist")
    measured: dict[str, dict[str, Any]] = {}
    for network in NETWORKS:
        reference = trained(network, data, scale.epochs, BENCH)
        for target in _BITS.values():
            quantised(reference, data, BENCH, target)  # type: ignore[arg-type]
        for name, environment in (("as it is", dict(os.environ)), ("restricted", restricted())):
            say(f"{network}, {name}")
            arguments = ("--measure", network, "--scale", msgspec.json.encode(scale).decode())
            found = _child(*arguments, environment=environment)
            measured[f"{network}/{found['class']}"] = found
    parts = tuple(_checks(measured)), (_accuracies(measured), _speeds(measured))
    for found in measured.values():
        for entry in found.values():
            if isinstance(entry, dict):
                entry.pop("right", None)  # 10,000 numbers each; what they show is in the checks
    return Part(*parts, measured)


def _checks(measured: Mapping[str, dict[str, Any]]) -> list[Check]:
    checks = []
    classes = sorted({key.partition("/")[2] for key in measured})
    large = next((name for name in classes if name != "avx2"), None)
    silent = 0
    for network in NETWORKS:
        small = measured.get(f"{network}/avx2")
        for engine in ENGINES:
            what = f"{network}, int8 on {engine}:"
            if large is not None and small is not None:
                there, here = measured[f"{network}/{large}"][f"{engine} 7 bits"], small[f"{engine} 7 bits"]
                value, interval = _apart(there, here)
                checks.append(
                    _points(f"2.{network}.{engine}", f"{what} points of accuracy from {large} to avx2", value, interval)
                )
                wide = small[f"{engine} 8 bits"]
                wrong = "refused" not in wide and abs(
                    _apart(measured[f"{network}/{large}"][f"{engine} 8 bits"], wide)[0]
                )
                silent += bool(wrong and wrong > 0.3)
            if large is not None:
                full = measured[f"{network}/{large}"]
                value, interval = _apart(full[f"{engine} 8 bits"], full[f"{engine} 7 bits"])
                checks.append(
                    _points(
                        f"2.{network}.{engine}.bits",
                        f"{what} points that 7 bits cost against 8 on {large}",
                        value,
                        interval,
                    )
                )
                ratio = full[f"{engine} 7 bits"]["per_s"] / full[f"{engine} 8 bits"]["per_s"]
                what_speed = f"{what} speed of 7 bits over 8 on {large}"
                n = len(NETWORKS)
                checks.append(verdict(f"2.{network}.{engine}.speed", what_speed, ">= 0.9", ratio, None, n))
    if large is not None:
        what = "bundles that answer otherwise on avx2 without being refused"
        n = len(NETWORKS) * len(ENGINES)
        checks.append(verdict("3.silent", what, "<= 0", silent, None, n, unit="bundles"))
    return checks


def _points(id: str, what: str, value: float, interval: tuple[float, float]) -> Check:
    """A difference of accuracies; the value is judged, for the interval of 10,000 samples is as wide as the target."""
    holds = value <= 0.3
    why = f"the value is judged; {interval[0]:+.2f} to {interval[1]:+.2f} is its 95% interval"
    return Check(id, what, "points", _ALLOWED, value, interval, 10_000, holds, why)


def _apart(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    """Points of accuracy lost from one to the other, paired on the same samples, and the 95% interval."""
    difference = np.array(before["right"]) - np.array(after["right"])
    error = 1.96 * float(difference.std()) / len(difference) ** 0.5
    mean = float(difference.mean())
    return 100 * mean, (100 * (mean - error), 100 * (mean + error))


def _accuracies(measured: Mapping[str, dict[str, Any]]) -> Table:
    def shown(entry: Mapping[str, Any]) -> str:
        return "refused" if "refused" in entry else f"{entry['accuracy']:.4f}"

    return _table("Accuracy on the test part", measured, shown, "")


def _speeds(measured: Mapping[str, dict[str, Any]]) -> Table:
    def shown(entry: Mapping[str, Any]) -> str:
        if "speed" not in entry:
            return f"{entry['per_s']:,.0f}/s" if "per_s" in entry else "refused"
        value, low, high = entry["speed"]
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    note = (
        "In interleaved blocks of one run, all cores busy, each at its best batch. f32: samples per second; int8: its "
    )
    note += "throughput over f32 of the same engine and class, with the 95% interval."
    return _table("Speed of int8 over f32", measured, shown, note)


def _table(title: str, measured: Mapping[str, dict[str, Any]], shown: Callable[[Any], str], note: str) -> Table:
    columns = ("network", "class", *(f"{engine} {form}" for engine in ENGINES for form in ("f32", *_BITS)))
    rows = tuple(
        (*key.split("/"), *(shown(found[column]) for column in columns[2:])) for key, found in measured.items()
    )
    return Table(title, columns, rows, note)


def main() -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts to measure anew")
    parser.add_argument("--scale", default="{}", help="JSON: epochs, blocks, seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="NETWORK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = msgspec.json.decode(arguments.scale, type=Scale)
    if arguments.seen or arguments.measure:
        print(json.dumps(seen() if arguments.seen else measure(arguments.measure, scale)))
        return 0
    parts: dict[str, Callable[[], Part]] = {"restrict": restrict, "int8": lambda: int8(scale)}
    only = set(arguments.only)
    return run_parts(parts, arguments.out, kept=True, only=only, timed={"int8"}, seeds={"training": SEED})


if __name__ == "__main__":
    sys.exit(main())
