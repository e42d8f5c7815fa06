"""Send the frames of a video to a server, and follow who is found from frame to frame.

rushhour serve runs/pedestrians/run
python examples/driving/track.py http://127.0.0.1:8000 runs/pedestrians/street/street.avi > tracks.csv

A line for each person in each frame: frame, number of the person, x1, y1, x2, y2 in pixels of the video, score.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import urllib.request
from pathlib import Path

import numpy as np

from rushhour.data.frames import frames_of
from rushhour.task import overlaps

SCORE, SAME = 0.3, 0.3
"""Of a box that is followed; and its overlap with where the person was last seen, moved on as before."""
PATIENCE = 5
"""Frames that a person may be hidden."""


class Tracker:
    """Gives the same number to boxes of one person: each box continues the track that overlaps it most.

    A track is expected to go on as it did between its last two frames.
    """

    def __init__(self) -> None:
        self._tracks: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._next = 1

    def __call__(self, frame: int, boxes: np.ndarray) -> list[int]:
        """The number of the person of each box `(k, 4 or more)`."""
        self._tracks = {name: one for name, one in self._tracks.items() if frame - one[0] <= PATIENCE}
        names = list(self._tracks)
        expected = np.array([box + speed * (frame - last) for last, box, speed in self._tracks.values()]).reshape(-1, 4)
        shares, given = overlaps(boxes, expected), [0] * len(boxes)
        while shares.size and shares.max() > SAME:
            row, column = np.unravel_index(shares.argmax(), shares.shape)
            given[row] = names[column]
            shares[row], shares[:, column] = 0, 0
        for row, box in enumerate(boxes[:, :4]):
            name, speed = given[row], np.zeros(4)
            if not name:
                name, self._next = self._next, self._next + 1
            else:
                last, before, _ = self._tracks[name]
                speed = (box - before) / max(1, frame - last)
            given[row], self._tracks[name] = name, (frame, box.copy(), speed)
        return given


def ask(url: str, model: str, picture: bytes) -> np.ndarray:
    """The boxes `(k, 6)` in a JPEG, in its own pixels: x1, y1, x2, y2, score, class."""
    head = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1],
                    "parameters": {"binary_data_size": 4 + len(picture)}}],
        "outputs": [{"name": "boxes", "parameters": {"binary_data": True}}],
    }  # fmt: skip
    header = json.dumps(head).encode()
    body = header + len(picture).to_bytes(4, "little") + picture
    request = urllib.request.Request(f"{url}/v2/models/{model}/infer", body)
    request.add_header("Inference-Header-Content-Length", str(len(header)))
    with urllib.request.urlopen(request) as answer:
        content, begins = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
    boxes = np.frombuffer(content[begins:], np.float32).reshape(-1, 6)
    return boxes[boxes[:, 4] >= SCORE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("video", type=Path)
    parser.add_argument("--first", type=int, default=600, help="frame to begin with, the first that tests")
    arguments = parser.parse_args()
    with urllib.request.urlopen(f"{arguments.url}/v2/repository/index", b"{}") as answer:
        model = json.load(answer)[0]["name"]
    track = Tracker()
    persons: set[int] = set()
    for number, frame in frames_of(arguments.video):
        if number < arguments.first:
            continue
        picture = io.BytesIO()
        frame.save(picture, "JPEG", quality=90)
        boxes = ask(arguments.url, model, picture.getvalue())
        for name, (x1, y1, x2, y2, score, _) in zip(track(number, boxes), boxes.tolist(), strict=True):
            print(f"{number},{name},{x1:.0f},{y1:.0f},{x2:.0f},{y2:.0f},{score:.2f}")
            persons.add(name)
    print(f"{len(persons)} tracks", file=sys.stderr)


if __name__ == "__main__":
    main()
