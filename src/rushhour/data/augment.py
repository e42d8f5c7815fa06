"""Augmentation: pictures are rotated, shifted, scaled and changed in colour at random in training.

The change of a sample follows from (seed, epoch, sample) alone, not from its batch, the worker that prepares it, or
what was prepared before. kornia resamples the pixels.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rushhour.errors import DataError

_KEY = 0x617567
"""Keeps these random numbers apart from those that order the samples."""
_DRAWS = 9
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
    """

    def __init__(self, augmentation: Augmentation, samples: int, *, seed: int, epoch: int) -> None:
        self._how = augmentation
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
        if self._how.flip or self._how.crop or self._how.rotate or self._how.scale:
            images = self._moved(images, draws)
        if self._how.colour:
            images = self._tinted(images, draws)
        return images.clamp_(0, 1).mul_(255).permute(0, 2, 3, 1)

    def _moved(self, images: Tensor, draws: Tensor) -> Tensor:
        """Flip, shift, rotation and scale are one affine map, so pixels are interpolated once."""
        from kornia.geometry.transform import warp_affine  # the import takes a second, and only this needs it

        how, (height, width) = self._how, images.shape[2:]
        mirror = torch.where(draws[:, 0] < 0.5, -1.0, 1.0) if how.flip else torch.ones(len(draws))
        angle = _either_way(draws[:, 1]) * math.radians(how.rotate)
        zoom = 1 + _either_way(draws[:, 2]) * how.scale
        shift = torch.stack([_either_way(draws[:, 3]) * width, _either_way(draws[:, 4]) * height], dim=1) * how.crop
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        turn = torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)
        offset = centre + shift - torch.einsum("nij,j->ni", turn, centre)
        matrix = torch.cat([turn, offset.unsqueeze(2)], dim=2)
        moved: Tensor = warp_affine(images, matrix, (height, width), padding_mode="reflection", align_corners=True)
        return moved

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


def check_pictures(inputs: NDArray[Any], name: str) -> None:
    """Raise unless samples can be augmented.

    Raises:
        DataError: if they are not uint8 pictures `(n, height, width, channels)` with 1 or 3 channels.
    """
    if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[-1] not in (1, 3):
        raise DataError(
            f"cannot augment the samples of {name}",
            f"they are {inputs.dtype} of shape {inputs.shape[1:]}, and only pictures (uint8, height x width x 1 or 3) "
            "can be augmented",
            "leave out --augment",
        )


def _either_way(draw: Tensor) -> Tensor:
    """From 0..1 to -1..1."""
    return draw * 2 - 1
