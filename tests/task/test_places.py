"""Tasks about places in a picture, segmentation and detection: metrics, heads, losses, data, and the whole way."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import rushhour
from rushhour.api.inputs import load_data
from rushhour.bundle import Bundle, Preprocessing
from rushhour.compress import Recipe, Store, apply
from rushhour.compress.judge import outputs_of
from rushhour.data import load
from rushhour.data.arrays import from_arrays
from rushhour.data.augment import Augmentation, Augmenter
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, ModelError, TaskError
from rushhour.models import Deployed, detector, source_for, unet
from rushhour.models.deployed.graph import graph_of
from rushhour.plan import Precision
from rushhour.progress import Silent
from rushhour.records.answers import box_deviation, deviation
from rushhour.task import VOID, Detection, Segmentation, Task, overlaps
from rushhour.testing.kinds import check_kind
from rushhour.train.loss import imitation_for, loss_for
from rushhour.train.spatial_loss import focal_and_distance

SIDES = 48, 64
SEGMENTED, DETECTED = (Task(kind, ("disc", "square"), 2) for kind in ("segmentation", "detection"))
PIXELS = Preprocessing(1 / 255, layout="NHWC->NCHW")


def scenes(n: int, seed: int = 0, most: int = 3) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures of bright discs and squares on noise, their class maps (0 is the ground), and their boxes."""
    draw, (height, width) = np.random.default_rng(seed), SIDES
    x = draw.integers(0, 60, (n, height, width, 3)).astype(np.uint8)
    maps, boxes = np.zeros((n, height, width), np.uint8), np.zeros((n, most, 5), np.float32)
    boxes[..., 4] = -1
    down, across = np.mgrid[:height, :width]
    for row in range(n):
        for number in range(int(draw.integers(0, most + 1)) if row else most):
            kind, r = int(draw.integers(0, 2)), int(draw.integers(5, 9))
            cy, cx = int(draw.integers(r, height - r)), int(draw.integers(r, width - r))
            where = (np.abs(down - cy) <= r) & (np.abs(across - cx) <= r)
            if kind == 0:
                where &= (down - cy) ** 2 + (across - cx) ** 2 <= r * r
            x[row][where] = draw.integers(140, 255, 3) if kind else (230, 90, 60)
            maps[row][where] = 1 + kind
            boxes[row, number] = cx - r, cy - r, cx + r + 1, cy + r + 1, kind
    return x, maps, boxes


def answers_for(boxes: NDArray[np.float32], seed: int = 0, most: int = 20) -> NDArray[np.float32]:
    """Answers of a mediocre detector: boxes moved a little, some missing, some too many."""
    draw = np.random.default_rng(seed)
    found = np.zeros((len(boxes), most, 6), np.float32)
    for row, wanted in enumerate(boxes):
        near = [
            [*(box[:4] + draw.normal(0, 2, 4)), draw.uniform(0.3, 1), box[4]]
            for box in wanted[wanted[:, 4] >= 0]
            if draw.random() > 0.2
        ]
        wrong = [
            [x, y, x + 12, y + 12, draw.uniform(0.05, 0.7), draw.integers(0, 2)] for x, y in draw.uniform(0, 40, (3, 2))
        ]
        rows = np.array(sorted(near + wrong, key=lambda each: -each[4]), np.float32)
        found[row, : len(rows)] = rows
    return found


# Metrics.


def test_the_kinds_keep_the_promises_of_the_seam() -> None:
    _, maps, boxes = scenes(30)
    shifted = np.roll(maps, 3, axis=2)
    check_kind(Segmentation(3), shifted, maps)
    check_kind(Detection(2), answers_for(boxes), boxes)


def test_mean_iou_is_of_classes_that_are_anywhere_and_leaves_void_out() -> None:
    target = np.array([[[0, 0, 1, 1], [VOID, 0, 1, 1]]], np.uint8)
    answer = np.array([[[0, 1, 1, 1], [3, 0, 1, 0]]], np.uint8)
    kind = Segmentation(5)
    found = kind.statistics(answer, target)
    assert kind.reduce(found) == pytest.approx((2 / 4 + 3 / 5) / 2), "classes 2 to 4 are nowhere: void hides the 3"
    assert kind.by_class(found)[0].tolist() == [0, 1]
    twice = np.concatenate([found, found])
    assert kind.reduce(twice) == kind.reduce(found)
    assert "run from 0 to 9" in kind.why_wrong(np.full((1, 2, 2), 9) * [[0, 1], [1, 1]])


def brute_force_ap(answers: NDArray[Any], targets: NDArray[Any], label: int, overlap: float) -> float:
    """The definition, box by box: sorted by score, greedily matched, all-point interpolation."""
    every = sorted(
        (
            (float(box[4]), row, box)
            for row, found in enumerate(answers)
            for box in found
            if box[4] > 0 and box[5] == label
        ),
        key=lambda each: -each[0],
    )
    wanted = [[box for box in found if box[4] == label] for found in targets]
    taken = [[False] * len(each) for each in wanted]
    right, curve, total = 0, [], sum(map(len, wanted))
    for count, (_, row, box) in enumerate(every, 1):
        shares = [
            (0 if taken[row][at] else float(overlaps(box[None], other[None])[0, 0]))
            for at, other in enumerate(wanted[row])
        ]
        best = int(np.argmax(shares)) if shares else -1
        if best >= 0 and shares[best] >= overlap:
            taken[row][best] = True
            right += 1
        curve.append((right / total, right / count))
    area, before = 0.0, 0.0
    for recall in sorted({each for each, _ in curve}):
        area += (recall - before) * max(precision for at, precision in curve if at >= recall)
        before = recall
    return area


def test_average_precision_is_that_of_the_definition() -> None:
    _, _, boxes = scenes(40)
    answers, kind = answers_for(boxes), Detection(2)
    found = kind.statistics(answers, boxes)
    for overlap in (0.5, 0.75):
        wanted = np.mean([brute_force_ap(answers, boxes, label, overlap) for label in (0, 1)])
        assert kind.average_precision(found, overlap) == pytest.approx(wanted)
    assert 0.1 < kind.mean_average_precision(found) < kind.reduce(found) < 1
    nothing = np.zeros_like(answers)
    assert kind.reduce(kind.statistics(nothing, boxes)) == 0
    assert kind.reduce(kind.statistics(nothing, np.full_like(boxes, -1))) == 1, "nothing to find, and nothing found"
    double = np.concatenate([answers[:, :10], answers[:, :10]], axis=1)
    assert kind.reduce(kind.statistics(double, boxes)) < kind.reduce(found), (
        "an object that is found twice is once wrong"
    )


def test_metrics_have_paired_intervals_by_picture_and_by_group() -> None:
    _, maps, boxes = scenes(60)
    for task, targets, good, bad in (
        (SEGMENTED, maps.clip(0, 1), maps.clip(0, 1), np.roll(maps.clip(0, 1), 2, axis=1)),
        (DETECTED, boxes, answers_for(boxes, 1), answers_for(boxes, 2)[:, :2]),
    ):
        drop, (low, high) = task.compare(good, bad, targets)
        assert low <= drop <= high
        assert drop > 0
        _, (low_, high_) = task.compare(good, bad, targets, np.repeat(np.arange(6), 10))
        assert high_ > low_


def test_answers_of_two_engines_are_compared_as_what_they_are() -> None:
    """Labels have no distance, and boxes no fixed order."""
    _, maps, boxes = scenes(20)
    one = maps.copy()
    one[0, 0, 0] = 2 - one[0, 0, 0]
    assert deviation({"map": maps}, {"map": one}) == pytest.approx(1 / maps.size)
    answers = answers_for(boxes)
    assert box_deviation(answers, answers) == 0
    assert box_deviation(answers, answers[:, np.random.default_rng(0).permutation(20)]) == 0
    assert deviation({"boxes": answers}, {"boxes": answers[:, ::-1]}) > 0.1, "unless nobody says that they are boxes"
    moved = answers + np.float32([1, 0, 1, 0, 0, 0]) * (answers[..., 4:5] > 0)
    assert 0.001 < box_deviation(answers, moved) < 0.05
    assert box_deviation(answers, np.where(answers[..., 4:5] > 0.6, 0, answers)) > 0.1
    assert box_deviation(answers, np.full_like(answers, np.nan)) == np.inf


# Heads and losses.


def raw_of(boxes: NDArray[np.float32], classes: int = 2) -> torch.Tensor:
    """What a perfect detector gives."""
    from rushhour.train.spatial_loss import _places

    scores, numbers, _ = _places(torch.from_numpy(boxes), classes, 6, 8)
    return torch.cat([torch.logit(scores.clamp(1e-4, 1 - 1e-4)), numbers], dim=1)


def test_what_the_loss_asks_for_is_what_the_head_reads() -> None:
    _, _, boxes = scenes(30, most=2)
    apart = np.array([overlaps(pair[:1], pair[1:])[0, 0] == 0 or pair[1, 4] < 0 for pair in boxes])
    boxes = boxes[apart]
    raw = raw_of(boxes).requires_grad_()
    task = Task("detection", ("disc", "square"), 2)
    head = Deployed(detector(3, 2), task, PIXELS).head
    kind = Detection(2)
    found = kind.statistics(head(raw).detach().numpy(), boxes)
    assert kind.mean_average_precision(found) > 0.95
    losses = loss_for(task, "none")(raw, torch.from_numpy(boxes))
    assert losses.shape == (len(boxes),)
    assert float(losses.detach().mean()) < 0.05
    empty = focal_and_distance(raw, torch.full((len(boxes), 1, 5), -1.0))
    assert bool((empty >= 0).all())
    empty.sum().backward()
    assert raw.grad is not None
    assert bool(raw.grad.isfinite().all()), "pictures without boxes can be learnt from"


def test_an_object_is_found_once_though_many_places_claim_it() -> None:
    raw = torch.full((1, 6, 6, 8), -6.0)
    raw[:, 2:] = 0
    raw[0, 0, 2, 2], raw[0, 0, 2, 4] = 3.0, 2.5  # no neighbours, so both are peaks
    raw[0, 4:, 2, 2] = raw[0, 4:, 2, 4] = np.log(8.0)  # 64 pixels wide: they overlap by more than 0.6
    head = Deployed(detector(3, 2), Task("detection", ("a", "b"), 2), PIXELS).head
    (found,) = head(raw)
    assert int((found[:, 4] > 0).sum()) == 1
    raw[0, 4:, 2, 2] = raw[0, 4:, 2, 4] = 0.0
    (found,) = head(raw)
    assert int((found[:, 4] > 0).sum()) == 2, "small ones are two objects"


def test_void_pixels_teach_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    maps = torch.full((2, 4, 4), VOID, dtype=torch.uint8)
    maps[0, 0, 0] = 1
    loss = loss_for(Task("segmentation", ("a", "b", "c"), 3), "none")(logits, maps)
    loss.sum().backward()
    assert loss[1] == 0
    assert logits.grad is not None
    assert int((logits.grad.abs().sum(dim=1) > 0).sum()) == 1


@pytest.mark.parametrize("task", [SEGMENTED, DETECTED], ids=lambda task: task.kind)
def test_a_student_that_answers_as_its_teacher_has_learnt_all(task: Task) -> None:
    raw = torch.randn(4, *task.raw_shape((*SIDES, 3)))
    imitate = imitation_for(task, 2.0)
    assert float(imitate(raw, raw)) == pytest.approx(0, abs=1e-5)
    assert float(imitate(raw + torch.randn_like(raw), raw)) > 0.01


@pytest.mark.parametrize("factory", [unet, detector])
def test_networks_take_pictures_of_any_sides(factory: Callable[..., torch.nn.Module]) -> None:
    task = SEGMENTED if factory is unet else DETECTED
    for sides in ((48, 64), (37, 53), (8, 8)):
        source = source_for(factory.__name__, (*sides, 3), task)
        deployed = Deployed(factory(**source.arguments), task, PIXELS)
        picture = np.zeros((2, *sides, 3), np.uint8)
        assert deployed.answer_shape(picture, "it") == task.answer_shape((*sides, 3))
        assert tuple(deployed.logits(torch.from_numpy(picture)).shape[1:]) == task.raw_shape((*sides, 3))


def test_a_network_for_another_task_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="use unet"):
        source_for("residual", (*SIDES, 3), SEGMENTED)
    with pytest.raises(ModelError, match="it gives boxes"):
        source_for("detector", (*SIDES, 3), Task.classification(("a", "b")))
    with pytest.raises(TaskError, match=r"needs answers of shape \(48, 64\)"):
        SEGMENTED.check_output((2,), "mine", (*SIDES, 3))


@pytest.mark.slow
def test_the_graph_suppresses_on_both_engines_as_torch_does() -> None:
    import onnxruntime
    import openvino

    x, _, _ = scenes(6)
    torch.manual_seed(0)
    network = detector(3, 2, width=8)
    with torch.no_grad():
        network.scores[1].bias += 3  # type: ignore[union-attr, operator, index]
    deployed = Deployed(network, DETECTED, PIXELS)
    deployed.settle(x, "it")
    with torch.no_grad():
        expected = deployed(torch.from_numpy(x)).numpy()
    assert (expected[..., 4] > 0).sum(axis=1).max() < expected.shape[1]
    graph = graph_of(deployed, "it", x, ["image"], "boxes")
    operators = {node.op_type for node in graph.graph.node}
    assert {"MaxPool", "TopK"} <= operators
    assert "NonMaxSuppression" not in operators, "its number of boxes would depend on the picture"
    content = graph.SerializeToString()
    for rows in (1, 6):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        (by_onnx,) = session.run(None, {"image": x[:rows]})
        by_openvino = openvino.compile_model(openvino.Core().read_model(io.BytesIO(content)), "CPU")(x[:rows])[0]
        for found in (by_onnx, by_openvino):
            assert box_deviation(expected[:rows], np.asarray(found)) < 1e-3
    onnx.checker.check_model(graph)


# Augmentation.


def test_class_maps_and_boxes_move_with_their_picture() -> None:
    """A picture that is its own class map: whatever is done to it is done to the map."""
    _, maps, boxes = scenes(24, most=1)
    maps[maps > 0] = 1
    pictures = (maps * 255)[..., None]
    how, rows = Augmentation(flip=True, crop=0.1, rotate=5, scale=0.1), np.arange(24)
    by_map = Augmenter(how, 24, seed=1, epoch=0, places="map")
    moved, labels = by_map(pictures, rows)[..., 0] / 255, by_map.moved(torch.from_numpy(maps), rows, SIDES)
    assert labels.dtype == torch.uint8
    assert not torch.equal(labels, torch.from_numpy(maps))
    assert float((moved - labels).abs().mean()) < 0.02
    by_box = Augmenter(how, 24, seed=1, epoch=0, places="boxes")
    seen = by_box(pictures, rows)[..., 0] > 128
    after = by_box.moved(torch.from_numpy(boxes), rows, SIDES)
    compared = 0
    for row in range(24):
        ys, xs = torch.nonzero(seen[row], as_tuple=True)
        x1, y1, x2, y2, label = after[row, 0].tolist()
        if label < 0 or not len(xs) or min(x1, y1) <= 1 or x2 >= SIDES[1] - 1 or y2 >= SIDES[0] - 1:
            continue
        around = np.array([[int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]], np.float64)
        assert overlaps(around, np.array([[x1, y1, x2, y2]]))[0, 0] > 0.6
        compared += 1
    assert compared > 8
    out = Augmenter(Augmentation(crop=0.5), 24, seed=1, epoch=0, places="boxes").moved(
        torch.from_numpy(boxes), rows, SIDES
    )
    gone = (out[..., 4] < 0) & (torch.from_numpy(boxes)[..., 4] >= 0)
    assert bool(gone.any()), "what has left the picture is not looked for"


# Data.


def save_all(folder: Path, x: NDArray[np.uint8]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, picture in enumerate(x):
        Image.fromarray(picture).save(folder / f"p{row:03d}.png")


def masks_in(folder: Path, n: int = 14) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    x, maps, _ = scenes(n)
    save_all(folder / "images", x)
    save_all(folder / "masks", maps)
    return x, maps


def coco_in(folder: Path, n: int = 14, **changes: Any) -> dict[str, Any]:
    x, _, boxes = scenes(n)
    save_all(folder, x)
    content: dict[str, Any] = {
        "images": [{"id": 10 + row, "file_name": f"p{row:03d}.png", "width": 64, "height": 48} for row in range(n)],
        "categories": [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}],
        "annotations": [
            {"image_id": 10 + row, "category_id": (3, 7)[int(box[4])], "iscrowd": 0,
             "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]}
            for row, found in enumerate(boxes) for box in found if box[4] >= 0
        ],
    }  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(content | changes))
    return content


def yolo_in(folder: Path, n: int = 14) -> None:
    x, _, boxes = scenes(n)
    save_all(folder / "images", x)
    (folder / "labels").mkdir()
    for row, found in enumerate(boxes):
        kept = found[found[:, 4] >= 0]
        middles = (kept[:, :2] + kept[:, 2:4]) / 2 / [64, 48]
        shares = np.concatenate([middles, (kept[:, 2:4] - kept[:, :2]) / [64, 48]], axis=1)
        lines = [f"{box[4]:.0f} {' '.join(map(str, each))}" for box, each in zip(kept, shares.tolist(), strict=True)]
        if lines:
            (folder / "labels" / f"p{row:03d}.txt").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text("train: images\nnames:\n  0: disc  # round\n  1: 'square'\nnc: 2\n")


def test_masks_are_read_with_their_pictures(tmp_path: Path) -> None:
    x, maps = masks_in(tmp_path / "shapes")
    (tmp_path / "shapes" / "classes.txt").write_text("ground\ndisc\nsquare\n")
    data = load(str(tmp_path / "shapes"))
    assert data.task == Task("segmentation", ("ground", "disc", "square"), 3)
    inputs = np.concatenate([data.train.inputs, data.validation.inputs, data.test.inputs])
    targets = np.concatenate([data.train.targets, data.validation.targets, data.test.targets])
    for row in range(len(x)):
        (at,) = np.flatnonzero((inputs == x[row]).all(axis=(1, 2, 3)))
        assert (targets[at] == maps[row]).all()
    half = load(str(tmp_path / "shapes"), size=(24, 32))
    assert half.train.targets.shape[1:] == (24, 32)
    assert set(np.unique(half.train.targets)) <= {0, 1, 2}, "labels are not averaged"
    arrays = from_arrays({"x": x, "y": maps}, name="arrays", seed=0)
    assert arrays.task.kind == "segmentation"
    white = from_arrays({"x": x, "y": (maps > 0) * 255}, name="white", seed=0)
    assert white.task.outputs == 2
    assert any("second class" in note for note in white.notes)


@pytest.mark.parametrize("write", [coco_in, yolo_in], ids=["coco", "yolo"])
def test_boxes_are_read_with_their_pictures(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "shapes")
    x, _, boxes = scenes(14)
    data = load(str(tmp_path / "shapes"))
    assert data.task == DETECTED
    assert any("have no boxes" in note for note in data.notes), "an empty picture is one where nothing is to be found"
    inputs = np.concatenate([data.train.inputs, data.validation.inputs, data.test.inputs])
    targets = [box for part in (data.train, data.validation, data.test) for box in part.targets]
    for row in range(len(x)):
        (at,) = np.flatnonzero((inputs == x[row]).all(axis=(1, 2, 3)))
        found, wanted = (each[each[:, 4] >= 0] for each in (targets[at], boxes[row]))
        assert np.allclose(found, wanted, atol=1e-3)
    double = load(str(tmp_path / "shapes"), size=(96, 128))
    assert double.train.targets[..., 2].max() > 64, "boxes are in pixels of the samples"


def test_parts_and_groups_of_a_folder(tmp_path: Path) -> None:
    coco_in(tmp_path / "whole" / "train")
    coco_in(tmp_path / "whole" / "val")
    data = load(str(tmp_path / "whole"))
    assert any("are in train too" in note for note in data.notes)
    masks_in(tmp_path / "drives", 24)
    lines = "".join(f"p{row:03d}.png,drive {row // 4}\n" for row in range(24))
    (tmp_path / "drives" / "groups.csv").write_text(lines)
    data = load(str(tmp_path / "drives"))
    assert data.train.groups is not None
    assert data.test.groups is not None
    assert not set(data.train.groups) & set(data.test.groups)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = coco_in(folder)
    change(content)
    (folder / "annotations.json").write_text(json.dumps(content))


def _first(content: dict[str, Any], **values: Any) -> None:
    content["annotations"][0].update(values)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "outside": (lambda at: changed(at, lambda c: _first(c, bbox=[50, 10, 40, 10])), "is not in its picture.*64x48"),
    "nan": (lambda at: changed(at, lambda c: _first(c, bbox=[1e400, 1, 2, 2])), "not in its picture|as COCO"),
    "names": (lambda at: changed(at, lambda c: c["categories"][0].update(name="disc")), "'disc' is there 2 times"),
    "category": (lambda at: changed(at, lambda c: _first(c, category_id=99)), "category 99"),
    "other picture": (
        lambda at: changed(at, lambda c: c["images"][0].update(width=640, height=480)), "of another picture",
    ),
    "missing": (lambda at: changed(at, lambda c: c["images"][0].update(file_name="q.png")), "no such file"),
    "above": (lambda at: changed(at, lambda c: c["images"][0].update(file_name="../../etc/passwd")), "below the same"),
    "no coco": (lambda at: changed(at, dict.clear), "no boxes as COCO has them"),
    "empty frame": (lambda at: (coco_in(at), (at / "p003.png").write_bytes(b"")), "p003.png.*it is empty"),
    "yolo outside": (
        lambda at: (yolo_in(at), (at / "labels" / "p001.txt").write_text("0 0.9 0.5 0.4 0.2\n")), "not in its picture",
    ),
    "yolo class": (lambda at: (yolo_in(at), (at / "labels" / "p001.txt").write_text("5 .5 .5 .1 .1")), "the class 5"),
    "yolo names": (lambda at: (yolo_in(at), (at / "data.yaml").write_text("names: [a, a]")), "'a' is there 2 times"),
    "yolo no names": (lambda at: (yolo_in(at), (at / "data.yaml").unlink()), "does not say the names"),
    "yolo polygon": (
        lambda at: (yolo_in(at), (at / "labels" / "p001.txt").write_text("0 .1 .1 .2 .1 .2 .2 .1 .2")), "is no box",
    ),
    "no mask": (lambda at: (masks_in(at), (at / "masks" / "p002.png").unlink()), "1 of 14 pictures.*no class map"),
    "mask of other size": (
        lambda at: (masks_in(at), Image.new("L", (32, 24)).save(at / "masks" / "p002.png")), "does not fit its picture",
    ),
    "photograph": (
        lambda at: (masks_in(at), Image.fromarray(scenes(1)[0][0]).save(at / "masks" / "p002.png")), "it is in colours",
    ),
    "grey photograph": (
        lambda at: (masks_in(at), [Image.fromarray(p).convert("L").save(f) for p, f in
                                   zip(scenes(14)[0], sorted((at / "masks").iterdir()), strict=True)]),
        "the grey values of a photograph",
    ),
    "jpeg mask": (
        lambda at: (masks_in(at), (at / "masks" / "p002.png").unlink(),
                    Image.new("L", (64, 48)).save(at / "masks" / "p002.jpg")), "changes labels at their borders",
    ),
    "same stem": (
        lambda at: (masks_in(at), Image.new("L", (64, 48)).save(at / "images" / "p002.jpg")), "are named p002",
    ),
    "group unknown": (lambda at: (masks_in(at), (at / "groups.csv").write_text("p000,a\n")), "13 of 14 pictures"),
    "two groups": (
        lambda at: (masks_in(at), (at / "groups.csv").write_text("p000,a\np001,b\np000,c\n")), "two groups for p000",
    ),
    "group in two parts": (
        lambda at: (masks_in(at / "train"), masks_in(at / "val"),
                    (at / "groups.csv").write_text("".join(f"p{row:03d},drive\n" for row in range(14)))),
        "1 groups of .* are in train and in validation",
    ),
    "class beyond": (
        lambda at: (masks_in(at), (at / "classes.txt").write_text("ground\ndisc\n")), "there are 2 classes|0..1",
    ),
    "class twice": (
        lambda at: (masks_in(at), (at / "classes.txt").write_text("ground\ndisc\ndisc\n")), "'disc' is there 2 times",
    ),
    "corners": (lambda at: changed(at, lambda c: _first(c, bbox=[30, 20, 60, 40])), "is not in its picture"),
    "yolo infinite": (
        lambda at: (yolo_in(at), (at / "labels" / "p001.txt").write_text("inf .5 .5 .1 .1")), "is no box",
    ),
    "yolo nan": (lambda at: (yolo_in(at), (at / "labels" / "p001.txt").write_text("0 nan .5 .1 .1")), "not in its"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_careless_annotations_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    write, message = BAD[case]
    write(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_boxes_without_area_are_left_out_and_counted(tmp_path: Path) -> None:
    changed(tmp_path / "coco", lambda content: _first(content, bbox=[30, 20, -10, 10]))
    yolo_in(tmp_path / "yolo")
    (tmp_path / "yolo" / "labels" / "p000.txt").write_text("0 .5 .5 -.1 .1\n1 .5 .5 .1 0\n1 .5 .5 .1 .1\n")
    for name, count in (("coco", 1), ("yolo", 2)):
        data = load(str(tmp_path / name))
        assert any(f"without area {count}" in note for note in data.notes), data.notes


def test_arrays_that_do_not_fit_are_refused() -> None:
    x, maps, boxes = scenes(20)
    outside = boxes.copy()
    outside[0, 0, 2] = 200
    nameless, endless = boxes.copy(), boxes.copy()
    nameless[0, 0, 4], endless[0, 0, 0] = np.nan, -np.inf
    for y, kind, message in (
        (maps[:, :20], "segmentation", "20x64 pixels"),
        (maps.astype(np.int64) * 200, "segmentation", "labels from 0 to 400"),
        (maps[:, 0, 0], "segmentation", "class maps of n are"),
        (boxes[..., :4], "detection", "x1, y1, x2, y2"),
        (outside, "detection", "not in their pictures"),
        (nameless, "detection", "its class is NaN"),
        (endless, "detection", "NaN or infinity"),
        (np.full_like(boxes, -1), "detection", "no picture has a box"),
        (boxes[:, :, [2, 3, 0, 1, 4]], "detection", "x1 < x2"),
    ):
        with pytest.raises(DataError, match=message):
            from_arrays({"x": x, "y": y}, name="n", seed=0, kind=kind)
    with pytest.raises(DataError, match="groups of n are in train and in test"):
        from_arrays(
            {"x_train": x, "y_train": boxes, "groups_train": np.arange(20), "x_test": x, "y_test": boxes,
             "groups_test": np.arange(20) + 19},
            name="n", seed=0, kind="detection",
        )  # fmt: skip


# The whole way.


def accuracies(bundle: Bundle, x: NDArray[Any], y: NDArray[Any]) -> dict[str, float]:
    """By engine, of the compiled graph; of torch, where the bundle has its module."""
    from rushhour.data.dataset import Split

    precision: Precision = "int8" if bundle.manifest.precision == "int8" else "f32"
    engines = ("openvino", "onnxruntime", *(("torch",) if bundle.manifest.source else ()))
    found = {}
    for engine in engines:
        answers = outputs_of(bundle, EngineConfig(engine, precision, max_batch=8), Split(x, y))  # type: ignore[arg-type]
        found[engine] = bundle.manifest.task.evaluate(answers, y)[0]
    return found


def asked(server: Any, content: bytes, shape: list[int], **parameters: Any) -> dict[str, Any]:
    """The answer to one encoded picture, in JSON."""
    import base64

    tensor = {"name": "image", "datatype": "BYTES", "shape": shape, "data": [base64.b64encode(content).decode()]}
    body: dict[str, Any] = {"inputs": [tensor]}
    if parameters:
        body["outputs"] = [{"name": "boxes", "parameters": parameters}]
    request = urllib.request.Request(f"{server.url}/v2/models/{server.model}/infer", json.dumps(body).encode())
    answer: dict[str, Any] = json.load(urllib.request.urlopen(request))["outputs"][0]
    return answer


def smaller(trained: Bundle, x: NDArray[Any], y: NDArray[Any], folder: Path) -> Bundle:
    """Pruned, distilled, in int8."""
    # small batches: of 500 pictures, four batches of 128 in an epoch teach nothing
    recipe = Recipe.parse("prune:0.3,distil:4:batch=16:lr=0.005,int8")
    *_, small = apply(recipe, trained, load_data((x, y), Silent(), trained), Store(folder / "store"), progress=Silent())
    assert small.manifest.precision == "int8"
    assert small.manifest.parameters < 0.8 * trained.manifest.parameters
    return small


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_class_maps_are_compressed(tmp_path: Path) -> None:
    x, maps, _ = scenes(500)
    held_x, held, _ = scenes(100, seed=1)
    trained = rushhour.train("unet", (x, maps), out=tmp_path / "model", epochs=3, batch=16, lr=5e-3).bundle
    small = smaller(trained, x, maps, tmp_path)
    assert min(accuracies(small, held_x, held).values()) > 0.5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_places_go_all_the_way(tmp_path: Path, kind: str) -> None:
    """Trained with geometric augmentation, compressed, tuned, served: answers are in pixels of the client's picture."""
    x, maps, boxes = scenes(500)
    y = maps if kind == "segmentation" else boxes
    held_x, held_maps, held_boxes = scenes(100, seed=1)
    held = held_maps if kind == "segmentation" else held_boxes
    model = "unet" if kind == "segmentation" else "detector"
    epochs = 5 if kind == "segmentation" else 16
    trained = rushhour.train(
        model, (x, y), out=tmp_path / "model", task=kind, epochs=epochs, batch=16, lr=5e-3, augment="flip,scale"
    ).bundle
    (output,) = trained.manifest.signature.outputs
    assert output.places == ("map" if kind == "segmentation" else "boxes")
    found = accuracies(trained, held_x, held)
    assert found["torch"] > 0.75, found
    for engine in ("openvino", "onnxruntime"):
        assert abs(found[engine] - found["torch"]) < 0.001, "the compiled graph is as good as torch within 0.1 point"
    if kind == "detection":  # of class maps: the next test
        small = smaller(trained, x, y, tmp_path)
        assert min(accuracies(small, held_x, held).values()) > 0.5
    goal = {"slo": "p99<500ms", "max_accuracy_drop": "20%"}
    plan = rushhour.tune(trained, (x, y), out=tmp_path / "run", **goal, budget="20s", recipes="none").plan
    assert plan.evidence is not None
    assert plan.evidence.metric == ("mean_iou" if kind == "segmentation" else "ap50")
    large = Image.fromarray(held_x[0]).resize((192, 96), Image.Resampling.NEAREST)
    file = io.BytesIO()
    large.save(file, "PNG")
    with rushhour.serve(tmp_path / "run", http_port=0, grpc_port=None) as server:
        answer = asked(server, file.getvalue(), [1])
        if kind == "segmentation":
            assert answer["shape"] == [1, 96, 192]
            served = np.array(answer["data"]).reshape(96, 192)
            wanted = np.asarray(Image.fromarray(held_maps[0]).resize((192, 96), Image.Resampling.NEAREST))
            assert (served == wanted).mean() > 0.9
        else:
            served = np.array(answer["data"]).reshape(-1, 6)
            wanted = held_boxes[0][held_boxes[0][:, 4] >= 0] * [3, 2, 3, 2, 1]
            best = overlaps(wanted, served[served[:, 4] > 0.2]).max(axis=1)
            assert np.median(best) > 0.6
            named = asked(server, file.getvalue(), [1], classification=2)
            assert named["datatype"] == "BYTES"
            score, index, label, *corners = named["data"][0].split(":")
            assert (float(score), label) == (pytest.approx(served[0, 4], abs=1e-5), str(int(index)))
            assert np.allclose([float(each) for each in corners], served[0, :4], atol=0.01)


# Videos.


def film(file: Path, n: int = 40, **changes: Any) -> NDArray[np.float32]:
    """A video of scenes, and the boxes of every second frame beside it."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    x, _, boxes = scenes(n)
    with av.open(str(file), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        for picture in x:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        video.mux(stream.encode())
    shown_ = range(0, n, 2)
    content: dict[str, Any] = {
        "images": [{"id": row, "frame": row, "width": 64, "height": 48} for row in shown_],
        "categories": [{"id": 0, "name": "disc"}, {"id": 1, "name": "square"}],
        "annotations": [
            {"image_id": row, "category_id": int(box[4]),
             "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]}
            for row in shown_ for box in boxes[row] if box[4] >= 0
        ],
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(content | changes))
    return boxes


def test_frames_of_a_video_are_split_in_time(tmp_path: Path) -> None:
    boxes = film(tmp_path / "street.avi", 60)
    data = load(str(tmp_path / "street.avi"))
    assert data.task == DETECTED
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 3, 3)
    assert data.test.groups is not None
    for row, found in zip(range(0, 48, 2), data.train.targets, strict=True):
        kept, wanted = (each[each[:, 4] >= 0] for each in (found, boxes[row]))
        assert np.allclose(kept, wanted, atol=1e-3)
    names = ["train"] * 10 + ["val"] * 4 + ["test"] * 6
    images = [{"id": 2 * row, "frame": 2 * row, "split": name} for row, name in enumerate(names)]
    film(tmp_path / "parts.avi", images=images)
    data = load(str(tmp_path / "parts.avi"))
    assert (len(data.train), len(data.validation), len(data.test)) == (10, 4, 6)


def test_careless_videos_are_refused_in_one_line(tmp_path: Path) -> None:
    late = [{"id": row, "frame": row + 400} for row in range(0, 40, 2)]
    twice = [{"id": row, "frame": 3} for row in range(0, 40, 2)]
    larger = [{"id": row, "frame": row, "width": 640, "height": 480} for row in range(0, 40, 2)]
    for images, message in (
        (late, "the frame 400"), (twice, "as another is"), (larger, "of another picture"),
        ([{"id": row} for row in range(40)], "has no number"),
    ):  # fmt: skip
        film(tmp_path / "street.avi", images=images)
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / "street.avi"))
    film(tmp_path / "street.avi")
    (tmp_path / "street.avi").write_bytes((tmp_path / "street.avi").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cannot read the video|ends before it"):
        load(str(tmp_path / "street.avi"))
    (tmp_path / "street.json").unlink()
    with pytest.raises(DataError, match="has no boxes"):
        load(str(tmp_path / "street.avi"))


def test_a_tracker_keeps_the_number_of_who_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples" / "driving")
    from track import PATIENCE, Tracker

    track = Tracker()
    for frame in range(12):  # two persons who walk through each other, and one who is hidden for two frames
        boxes = np.array([[10 + 6 * frame, 10, 30 + 6 * frame, 60], [110 - 6 * frame, 30, 130 - 6 * frame, 80]], float)
        third = np.array([[200.0, 10, 220, 60]])
        assert track(frame, boxes if frame in (4, 5) else np.concatenate([boxes, third]))[:2] == [1, 2]
        assert frame in (4, 5) or track(frame, third) == [3]
    assert track(12 + 2 * PATIENCE, np.array([[200.0, 10, 220, 60]])) == [4], "who was away for long is a new one"


@pytest.mark.slow
def test_a_report_draws_examples_without_trusting_names(tmp_path: Path) -> None:
    from rushhour.bundle import TensorSpec
    from rushhour.models import export
    from rushhour.report.examples import examples_of

    x, _, _ = scenes(4)
    torch.manual_seed(0)
    network = detector(3, 2, width=8)
    with torch.no_grad():
        network.scores[1].bias += 4  # type: ignore[union-attr, operator, index]
    for name, task, net in (
        ("boxes", Task("detection", ("<script>1", "<script>2"), 2), network),
        ("map", Task("segmentation", ("<script>1", "<script>2"), 2), unet(64, 3, 2)),
    ):
        export(
            net, name=name, task=task, sample_spec=TensorSpec("image", "uint8", (*SIDES, 3)), preprocessing=PIXELS,
            source=None, lineage=(), samples=x, path=tmp_path / name,
        )  # fmt: skip
        drawings = examples_of(tmp_path / name)
        assert len(drawings) == 4
        page = "".join(drawings)
        assert "<script>" not in page
        assert "&lt;script&gt;" in page
        assert ("<rect" in page) == (name == "boxes")
        assert page.count("data:image/jpeg") == 4
        assert len(page) < 200_000
    assert examples_of(tmp_path / "nothing") == []
