"""Solar cells by electroluminescence: a folder of cells to learn from, and a picture of a whole module.

python examples/manufacturing/modules.py cells cells        # train, validation and test, functional and defective
python examples/manufacturing/modules.py module module.png  # 6 x 10 cells of the test part, and module.json, the truth
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

CLASSES = ("functional", "defective")
SHARES = (("train", 0.0, 0.6), ("validation", 0.6, 0.75), ("test", 0.75, 1.0))
ROWS, COLUMNS, SIDE = 6, 10, 300


def cells(package: Package) -> list[tuple[str, float, str, str]]:
    """Of each cell its file, the probability of a defect that people gave it, `mono` or `poly`, and its part.

    Every part has its share of each probability and each kind. Which module a cell is of is not in the data.
    """
    lines = [line.split() for line in package.read("data/labels.csv").decode().splitlines() if line.strip()]
    chance = np.random.default_rng(0)
    found = []
    for stratum in sorted({(probability, kind) for _, probability, kind in lines}):
        own = [line for line in lines if tuple(line[1:]) == stratum]
        places = chance.permutation(len(own)) / len(own)
        for (name, probability, kind), place in zip(own, places, strict=True):
            part = next(part for part, first, last in SHARES if first <= place < last)
            found.append((name, float(probability), kind, part))
    return found


def label_of(probability: float) -> str:
    """As in Deitsch et al. 2019: above one half it is defective."""
    return CLASSES[probability > 0.5]


def write_cells(package: Package, out: Path) -> None:
    described = cells(package)
    pictures = package.read_all([name for name, *_ in described])
    for name, probability, _, part in described:
        folder = out / part / label_of(probability)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / Path(name).name).write_bytes(pictures[name])
    print(f"{len(described):,} cells in {out}")


def write_module(package: Package, out: Path, seed: int) -> None:
    """A picture of real cells side by side, of one kind: only the arrangement is made."""
    rows = [row for row in cells(package) if row[2] == "poly" and row[3] == "test"]
    chosen = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))[: ROWS * COLUMNS]]
    pictures = package.read_all([name for name, *_ in chosen])
    module = Image.new("L", (COLUMNS * SIDE, ROWS * SIDE))
    for at, (name, *_) in enumerate(chosen):
        module.paste(Image.open(io.BytesIO(pictures[name])), (at % COLUMNS * SIDE, at // COLUMNS * SIDE))
    module.save(out)
    truth = np.array([label_of(probability) == CLASSES[1] for _, probability, *_ in chosen]).reshape(ROWS, COLUMNS)
    out.with_suffix(".json").write_text(json.dumps({"rows": ROWS, "columns": COLUMNS, "defective": truth.tolist()}))
    print(f"{out}: {truth.sum()} of {truth.size} cells are defective")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "module"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="which cells a module has")
    arguments = parser.parse_args()
    package = Package("elpv-dataset")
    if arguments.what == "cells":
        write_cells(package, arguments.out)
    else:
        write_module(package, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
