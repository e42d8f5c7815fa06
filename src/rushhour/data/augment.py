"""Augmentation: pictures are rotated, shifted, scaled and changed in colour at random in training.

The change of a sample follows from (seed, epoch, sample) alone, not from its batch, the worker that prepares it, or
what was prepared before. kornia resamples the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rushhour.bundle import described
from rushhour.errors import DataError
from rushhour.task import Places

_KEY = 0x617567
"""Keeps these random numbers apart from those that order the samples."""
_DRAWS = 9
_LEFT = 0.25
"""Share of a box that must stay in a moved picture."""
_EXAMPLE = "write for example flip,crop,rotate=10,scale=0.1,colour=0.2"


class Augmentation(msgspec.Struct, frozen=True):
    """Random changes of a picture in training. All are off by default.

    Attributes:
        flip: mirror every second picture horizontally.
        crop: shift by up to this share of the sides; the border is filled with its mirror image.
        rotate: by up to so many degrees, in either direction.
        scale: enlarged or shrunk by up to this share.
        colour: brightness and contrast change by up to this share, and in colour pictures saturation too; hue by up
            to a tenth of it, of the whole circle.
    """

    flip: bool = False
    crop: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        bounds = {"crop": 0.5, "rotate": 180.0, "scale": 0.9, "colour": 1.0}
        for name, highest in bounds.items():
            value = getattr(self, name)
            if not 0 <= value <= highest:
                raise DataError(
                    f"cannot augment with {name}={value:g}", f"it must be from 0 to {highest:g}", "change that value"
                )

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Read `flip,crop,rotate=10,scale=0.1,colour=0.2`; a name alone takes the value it has there, crop 0.1.

        Raises:
            DataError: if a name is unknown, given twice, or its value is no number in its bounds.
        """
        usual = {"flip": 1.0, "crop": 0.1, "rotate": 10.0, "scale": 0.1, "colour": 0.2}
        chosen: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in usual or name in chosen or (name == "flip" and equals):
                why = "it is given twice" if name in chosen else f"there are {', '.join(usual)}; flip takes no value"
                raise DataError(f"cannot augment with {part.strip()!r}", why, _EXAMPLE)
            try:
                chosen[name] = float(value) if equals else usual[name]
            except ValueError:
                raise DataError(
                    f"cannot augment with {part.strip()!r}", "its value is not a number", _EXAMPLE
                ) from None
        return cls(flip=bool(chosen.pop("flip", False)), **chosen)

    def times(self, strength: float) -> Augmentation:
        """The same with each bound `strength` times as large, up to its limit; flip only above 0.

        Args:
            strength: 0 or more.
        """
        return Augmentation(
            flip=self.flip and strength > 0,
            crop=min(0.5, self.crop * strength),
            rotate=min(180.0, self.rotate * strength),
            scale=min(0.9, self.scale * strength),
            colour=min(1.0, self.colour * strength),
        )

    def __str__(self) -> str:
        parts = ["flip"] if self.flip else []
        parts += [f"{name}={getattr(self, name):g}" for name in ("crop", "rotate", "scale", "colour")]
        return ",".join(part for part in parts if not part.endswith("=0"))


class Augmenter:
    """Applies an `Augmentation` in one epoch.

    Args:
        augmentation: the changes.
        samples: in the whole training part.
        seed: of the training.
        epoch: from 0.
        places: what targets say about places in the picture. Beyond the border of a moved picture is its mirror image,
            with its labels; where targets are boxes, the pixels of the border go on, for mirror images have no boxes.
    """

    def __init__(
        self, augmentation: Augmentation, samples: int, *, seed: int, epoch: int, places: Places | None = None
    ) -> None:
        self._how = augmentation
        self._border = "border" if places == "boxes" else "reflection"
        random = np.random.default_rng((seed, epoch, _KEY))
        self._draws = random.random((samples, _DRAWS), dtype=np.float32)

    def __call__(self, pictures: NDArray[np.uint8], rows: NDArray[np.int64]) -> Tensor:
        """The augmented pictures.

        Args:
            pictures: shape `(n, height, width, channels)` with 1 or 3 channels, uint8.
            rows: which samples of the training part they are.

        Returns:
            float32 of the same shape, between 0 and 255.
        """
        draws = torch.from_numpy(self._draws[rows])
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32) / 255
        if self._moves:
            images = self._moved(images, draws)
        if self._how.colour:
            images = self._tinted(images, draws)
        return images.clamp_(0, 1).mul_(255).permute(0, 2, 3, 1)

    def batch(self, columns: Sequence[NDArray[Any]], rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Each input of the samples, with its pictures augmented, all of a sample alike; others are left as they are.

        Args:
            columns: an array `(n, *shape)` for each input. A network of several inputs gets them as they are, so that
                its pictures stay whole pixels.
            rows: which samples of the training part they are.
        """
        if len(columns) == 1:
            return (self(columns[0], rows),)
        return tuple(
            self(column, rows).round_().to(torch.uint8) if is_picture(column) else torch.from_numpy(column)
            for column in columns
        )

    @property
    def _moves(self) -> bool:
        return bool(self._how.flip or self._how.crop or self._how.rotate or self._how.scale)

    def moved(self, targets: Tensor, rows: NDArray[np.int64], sides: tuple[int, ...]) -> Tensor:
        """The targets of pictures, moved as these are.

        Args:
            targets: class maps `(n, height, width)`, or boxes `(n, boxes, 5)` in pixels. A box of which less than a
                quarter stays in the picture is none any more.
            rows: which samples of the training part they are.
            sides: height and width of the pictures.
        """
        if not self._moves:
            return targets
        from kornia.geometry.transform import warp_affine

        matrix = self._matrix(torch.from_numpy(self._draws[rows]), *sides)
        if self._border == "border":
            return _moved_boxes(targets, matrix, *sides)
        maps = targets[:, None].to(torch.float32)
        moved: Tensor = warp_affine(
            maps, matrix, (sides[0], sides[1]), mode="nearest", padding_mode="reflection", align_corners=True
        )
        labels: Tensor = moved[:, 0].round().to(targets.dtype)
        return labels

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip, shift, rotation and scale are one affine map, so pixels are interpolated once."""
        from kornia.geometry.transform import warp_affine  # the import takes a second, and only this needs it

        height, width = images.shape[2:]
        matrix = self._matrix(draws, height, width)
        moved: Tensor = warp_affine(images, matrix, (height, width), padding_mode=self._border, align_corners=True)
        return moved

    def _matrix(self, draws: Tensor, height: int, width: int) -> Tensor:
        """From places of pixels in the picture to those in the moved one, `(n, 2, 3)`."""
        how = self._how
        mirror = torch.where(draws[:, 0] < 0.5, -1.0, 1.0) if how.flip else torch.ones(len(draws))
        angle = _either_way(draws[:, 1]) * math.radians(how.rotate)
        zoom = 1 + _either_way(draws[:, 2]) * how.scale
        shift = torch.stack([_either_way(draws[:, 3]) * width, _either_way(draws[:, 4]) * height], dim=1) * how.crop
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        turn = torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)
        offset = centre + shift - torch.einsum("nij,j->ni", turn, centre)
        return torch.cat([turn, offset.unsqueeze(2)], dim=2)

    def _tinted(self, images: Tensor, draws: Tensor) -> Tensor:
        from kornia.enhance import (
            adjust_brightness_accumulative,
            adjust_contrast_with_mean_subtraction,
            adjust_hue,
            adjust_saturation_with_gray_subtraction,
        )

        strength = self._how.colour
        images = adjust_brightness_accumulative(images, 1 + _either_way(draws[:, 5]) * strength)
        images = adjust_contrast_with_mean_subtraction(images, 1 + _either_way(draws[:, 6]) * strength)
        if images.shape[1] == 3:
            images = adjust_saturation_with_gray_subtraction(images, 1 + _either_way(draws[:, 7]) * strength)
            images = adjust_hue(images, _either_way(draws[:, 8]) * strength * 0.1 * 2 * math.pi)
        return images


def _moved_boxes(boxes: Tensor, matrix: Tensor, height: int, width: int) -> Tensor:
    """Around the moved corners of each box, inside the picture."""
    x1, y1, x2, y2, label = boxes.unbind(dim=2)
    corners = torch.stack([torch.stack([x, y], dim=2) for x in (x1, x2) for y in (y1, y2)], dim=2) - 0.5
    moved = torch.einsum("nij,nbcj->nbci", matrix[..., :2], corners) + matrix[:, None, None, :, 2] + 0.5
    low, high = moved.amin(dim=2), moved.amax(dim=2)
    limits = torch.tensor([width, height], dtype=boxes.dtype)
    inside_low, inside_high = (torch.minimum(each.clamp_min(0), limits) for each in (low, high))
    left = (inside_high - inside_low).prod(dim=2) >= _LEFT * (high - low).prod(dim=2)
    label = torch.where(left & (label >= 0), label, -torch.ones_like(label))
    return torch.cat([inside_low, inside_high, label.unsqueeze(2)], dim=2)


def is_picture(inputs: NDArray[Any]) -> bool:
    """Whether these are uint8 pictures `(n, height, width, channels)` with 1 or 3 channels."""
    return inputs.dtype == np.uint8 and inputs.ndim == 4 and inputs.shape[-1] in (1, 3)


def check_pictures(inputs: NDArray[Any], name: str) -> None:
    """Raise unless samples can be augmented.

    Raises:
        DataError: if they are no pictures, or have several inputs and no picture among them.
    """
    if names := inputs.dtype.names:
        held = f"they are {described(inputs)}"
        fits = any(is_picture(inputs[each][:1]) for each in names)
    else:
        held, fits = f"they are {inputs.dtype} of shape {inputs.shape[1:]}", is_picture(inputs)
    if not fits:
        raise DataError(
            f"cannot augment the samples of {name}",
            f"{held}, and only pictures (uint8, height x width x 1 or 3) can be augmented",
            "leave out --augment",
        )


def _either_way(draw: Tensor) -> Tensor:
    """From 0..1 to -1..1."""
    return draw * 2 - 1
