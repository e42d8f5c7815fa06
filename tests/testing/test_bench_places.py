"""Line 3 of the examples' benchmark, and the gallery's pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import picture  # noqa: E402
import render  # noqa: E402
from bench.record import Record  # noqa: E402
from fields_places import Scale, pairs, places_part, scenes  # noqa: E402
from runs import make_run  # noqa: E402

from rushhour.data.annotations import inside  # noqa: E402
from rushhour.data.boxes import read_boxes  # noqa: E402


def test_boxes_of_one_class_at_one_place_are_a_pair() -> None:
    box = np.float32([0, 0, 10, 10, 0.9, 0])
    near, other, nothing = box + np.float32([1, 0, 1, 0, -0.1, 0]), box.copy(), box.copy()
    other[5], nothing[4] = 1, 0
    assert pairs(np.stack([box, near, other, nothing])) == 1
    assert pairs(np.stack([box, other, nothing])) == 0


def test_scenes_have_the_boxes_of_their_maps() -> None:
    pictures, maps, boxes = scenes(20, seed=3)
    for picture_, drawn, found in zip(pictures, maps, boxes, strict=True):
        assert drawn[picture_.max(axis=2) >= 140].all()
        for x1, y1, x2, y2, kind in found[found[:, 4] >= 0].astype(int):
            assert kind + 1 in drawn[y1:y2, x1:x2] or len(found[found[:, 4] >= 0]) > 1


def test_annotated_frames_are_of_the_test_part_and_their_boxes_in_the_picture() -> None:
    found = read_boxes(ROOT / "examples" / "driving" / "by_hand.json")
    assert len(found.images) == 30
    assert {image.split for image in found.images} == {"test"}
    assert min(image.frame or 0 for image in found.images) >= 600
    for image, boxes in zip(found.images, found.boxes, strict=True):
        assert len(inside(boxes, (image.height, image.width), "it")) == len(boxes) >= 5


@pytest.mark.slow
def test_engines_are_compared_with_torch_and_little_training_is_said(tmp_path: Path) -> None:
    part = places_part(tmp_path / "places", Scale(train=32, test=8, map_epochs=1, box_epochs=1, sent=2))
    checks = {check.id: check for check in part.checks}
    assert set(checks) == {"3.segmentation", "3.detection", "3.suppression", "3.pixels"}
    assert checks["3.suppression"].holds
    assert checks["3.detection"].value is not None
    assert checks["3.detection"].value <= 0.1
    assert not checks["3.detection"].holds
    assert "untrained" in (checks["3.detection"].why or "")


def test_the_gallery_shows_a_small_picture_of_an_example_and_only_examples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = tmp_path / "gallery" / "heartbeats.svg"
    assert picture.draw_example(run, file)
    assert file.read_text().startswith("<svg")
    assert file.stat().st_size < 60_000
    record = Record.load(ROOT / "benchmarks" / "results" / "fields.json")
    record.data["parts"]["3"] = {"checks": [], "measured": {"train": 1}, "commit": "c", "busy_cores": 0.0}
    page = render.render_gallery(record, file.parent)
    assert "(gallery/heartbeats.svg)" in page
    assert "## 3" not in page
