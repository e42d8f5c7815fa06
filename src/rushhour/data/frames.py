"""The frames of a video with boxes: `street.avi`, and `street.json` beside it as COCO has them.

An image in that file has the number of its frame, from 0 on, as `frame`, and perhaps its part as `split`. Only frames
that are listed are samples. Without parts they are split in time: frames that follow each other are nearly the same.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rushhour.bundle import Bundle, Decoding
from rushhour.data.annotated import LARGEST_SIDE, BeforeReading, classes_for, stacked, target_of
from rushhour.data.annotations import Annotated
from rushhour.data.arrays import from_arrays
from rushhour.data.boxes import Boxes, read_boxes
from rushhour.data.dataset import Dataset
from rushhour.data.decoded import MAX_PIXELS, OnDecoded, shown
from rushhour.data.probing import shape_of
from rushhour.data.splits import PART_OF, PARTS
from rushhour.errors import DataError
from rushhour.picture import PictureInfo
from rushhour.system.extras import require
from rushhour.task import Task

_STRETCH_S: Final = 2.0
"""Frames of so many seconds are one group: intervals are of these, for each frame is no new evidence."""
_USUAL_RATE: Final = 25.0


def load_video(
    file: Path,
    *,
    size: tuple[int, int] | None,
    seed: int,
    bundle: Bundle | None = None,
    before_reading: BeforeReading | None = None,
    on_decoded: OnDecoded | None = None,
) -> Dataset:
    """The frames of a video that have boxes, as a data set for detection.

    Args:
        file: of the video; needs the extra `video`.
        size: height and width of the samples; by default the video's, at most 384.
        seed: of the split.
        bundle: a model that the data is for.
        before_reading: called with the task and the sample shape before frames are decoded.
        on_decoded: called now and then with how many frames are decoded, and of how many.

    Raises:
        DataError: if the video or its boxes cannot be read, or do not fit each other.
        TaskError: if the model has other classes.
    """
    beside = file.with_suffix(".json")
    if not beside.is_file():
        raise DataError(
            f"{shown(file)} has no boxes",
            f"there is no {shown(beside.name)} beside it",
            "write one as COCO has them, with the number of each image's frame as `frame`",
        )
    boxes = read_boxes(beside)
    rate, sides = _about(file)
    shape = shape_of(
        [(PictureInfo(*sides, True, False), file)],
        size,
        square=False,
        bundle=bundle,
        folder=file,
        largest=LARGEST_SIDE,
    )
    if before_reading is not None:
        before_reading(Task("detection", boxes.classes, len(boxes.classes)), shape)
    pixels, targets, numbers = read_frames(file, boxes, shape, on_decoded)
    split_of = {image.frame: image.split or "" for image in boxes.images}
    parts = [split_of[number] for number in numbers.tolist()]
    stretches = numbers // max(1, round(rate * _STRETCH_S))
    if len(np.unique(stretches)) < len(PARTS):
        stretches = numbers  # of so few seconds each frame is by itself
    data = from_arrays(
        _in_parts(pixels, targets, numbers, stretches, parts, beside),
        name=file.stem,
        source=shown(file),
        seed=seed,
        task=None if bundle is None else bundle.manifest.task,
        kind="detection",
        classes=classes_for(file, boxes.classes, bundle),
    )
    empty = int((targets[..., 4] < 0).all(axis=1).sum())
    notes = [f"frames that follow each other are alike: intervals are of stretches of {_STRETCH_S:g} s"]
    if empty:
        notes.append(f"{empty:,} of {len(numbers):,} frames have no boxes: nothing is to be found in them")
    return dataclasses.replace(
        data,
        preprocessing=msgspec.structs.replace(data.preprocessing, decoding=Decoding()),
        notes=(*boxes.notes, *notes, *data.notes),
    )


def read_frames(
    file: Path, boxes: Boxes, shape: tuple[int, int, int], on_decoded: OnDecoded | None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]]:
    """The frames of a video that have boxes, as samples `(n, *shape)`; their boxes `(n, most, 5)`; and their numbers.

    Args:
        file: of the video.
        boxes: of its frames.
        shape: of a sample: height, width, channels.
        on_decoded: see `load_video`.

    Raises:
        DataError: if the video cannot be read, or boxes do not fit it.
    """
    rows = _rows(boxes, file)
    pixels = np.empty((len(rows), *shape), np.uint8)
    targets: list[NDArray[Any]] = [np.empty(0)] * len(rows)
    numbers = np.zeros(len(rows), np.int64)
    done = 0
    for number, picture in frames_of(file):
        if (row := rows.get(number)) is None:
            continue
        at, info = done, PictureInfo(picture.height, picture.width, True, False)
        image = boxes.images[row]
        one = Annotated(Path(f"{file}#{number}"), boxes.boxes[row], (image.height, image.width))
        targets[at] = target_of(one, info, shape[:2])
        sample = picture.convert("L" if shape[2] == 1 else "RGB").resize(shape[1::-1], Image.Resampling.BILINEAR)
        pixels[at] = np.asarray(sample).reshape(shape)
        numbers[at] = number
        done += 1
        if on_decoded is not None and (done % 16 == 0 or done == len(rows)):
            on_decoded(done, len(rows))
        if done == len(rows):
            break
    if done < len(rows):
        missing = min(rows.keys() - set(numbers[:done].tolist()))
        raise DataError(
            f"there are boxes for the frame {missing} of {shown(file)}",
            "the video ends before it, or is damaged there",
            "number frames from 0, and check the video",
        )
    return pixels, stacked(targets), numbers


def _rows(boxes: Boxes, file: Path) -> dict[int, int]:
    """Number of a frame -> its place among the images.

    Raises:
        DataError: if an image has no number, or two have the same.
    """
    rows: dict[int, int] = {}
    for row, image in enumerate(boxes.images):
        if image.frame is None or image.frame in rows:
            what = "has no number" if image.frame is None else f"is the frame {image.frame}, as another is"
            raise DataError(
                f"an image of the boxes of {shown(file)} {what}",
                "boxes belong to a frame of the video",
                "give each image the number of its frame as `frame`, from 0 on",
            )
        rows[image.frame] = row
    return rows


def _in_parts(
    x: NDArray[np.uint8],
    y: NDArray[Any],
    numbers: NDArray[np.int64],
    stretches: NDArray[np.int64],
    parts: list[str],
    file: Path,
) -> dict[str, NDArray[Any]]:
    """Arrays by the names of `rushhour.data.arrays`: in the parts that are said, else with times."""
    if not any(parts):
        return {"x": x, "y": y, "times": numbers, "groups": stretches}
    named = [PART_OF.get(part.lower()) for part in parts]
    if None in named:
        raise DataError(
            f"{shown(file)} has images of the part {parts[named.index(None)]!r}",
            "a part is train, validation or test",
            "give `split` for all images, or for none",
        )
    given: dict[str, NDArray[Any]] = {}
    for part in sorted(set(map(str, named))):
        rows = np.flatnonzero(np.array(named) == part)
        given |= {f"x_{part}": x[rows], f"y_{part}": y[rows]}
        given[f"groups_{part}"] = np.array([f"{part} {stretch}" for stretch in stretches[rows].tolist()])
    return given


def _about(file: Path) -> tuple[float, tuple[int, int]]:
    """Frames in a second; height and width of a frame."""
    av = _av()
    try:
        with av.open(str(file)) as video:
            stream = video.streams.video[0]
            sides = int(stream.height), int(stream.width)
            rate = float(stream.average_rate or _USUAL_RATE)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not 0 < sides[0] * sides[1] <= MAX_PIXELS:
        raise DataError(
            f"cannot read {shown(file)}", f"its frames have {sides[1]}x{sides[0]} pixels", "make it smaller"
        )
    return rate, sides


def frames_of(file: Path) -> Iterator[tuple[int, Image.Image]]:
    """The frames in order, with their numbers."""
    av = _av()
    try:
        with av.open(str(file)) as video:
            for number, frame in enumerate(video.decode(video=0)):
                yield number, frame.to_image()
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: BaseException) -> DataError:
    return DataError(f"cannot read the video {shown(file)}", " ".join(str(error).split()), "convert or repair it")


def _av() -> Any:
    require("video")
    return importlib.import_module("av")
