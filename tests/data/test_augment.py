"""Pictures changed at random: by (seed, epoch, sample) alone, within their bounds, and read from the command line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rushhour.data.augment import Augmentation, Augmenter
from rushhour.errors import DataError

ALL = Augmentation.parse("flip,crop=0.2,rotate=20,scale=0.2,colour=0.4")


def photos(n: int, channels: int = 3, side: tuple[int, int] = (12, 16)) -> Any:
    return np.random.default_rng(1).integers(0, 256, (n, *side, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_happens_to_a_sample_depends_on_nothing_else(channels: int) -> None:
    pictures = photos(20, channels)
    rows = np.arange(20)
    whole = Augmenter(ALL, 20, seed=3, epoch=2)(pictures, rows)
    assert whole.shape == (20, 12, 16, channels)
    assert whole.dtype == torch.float32
    assert 0 <= float(whole.min()) < float(whole.max()) <= 255
    some = np.array([13, 2, 7])
    other = Augmenter(ALL, 20, seed=3, epoch=2)
    other(pictures, rows)
    torch.testing.assert_close(other(pictures[some], some), whole[torch.from_numpy(some)], rtol=0, atol=1e-3)
    for seed, epoch in ((3, 3), (4, 2)):
        changed = Augmenter(ALL, 20, seed=seed, epoch=epoch)(pictures, rows)
        assert all(not torch.allclose(changed[index], whole[index], atol=1) for index in range(20))


def test_equal_pictures_in_one_batch_are_changed_each_in_its_own_way() -> None:
    same = np.repeat(photos(1), 50, axis=0)
    for how in ("crop", "rotate", "scale", "colour"):
        changed = Augmenter(Augmentation.parse(how), 50, seed=0, epoch=0)(same, np.arange(50))
        assert len({picture.numpy().tobytes() for picture in changed}) == 50, how


def test_a_flip_is_exactly_the_mirror_image_for_about_every_second_one() -> None:
    pictures = photos(200)
    changed = Augmenter(Augmentation(flip=True), 200, seed=0, epoch=0)(pictures, np.arange(200)).numpy()
    flipped = [np.allclose(one, before[:, ::-1], atol=0.05) for one, before in zip(changed, pictures, strict=True)]
    kept = [np.allclose(one, before, atol=0.05) for one, before in zip(changed, pictures, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130


def test_a_crop_moves_by_no_more_than_its_share() -> None:
    """A bright point in the middle is found again, at most a tenth of the sides away."""
    pictures = np.zeros((100, 21, 41, 1), np.uint8)
    pictures[:, 10, 20] = 255
    changed = Augmenter(Augmentation(crop=0.1), 100, seed=0, epoch=0)(pictures, np.arange(100))[..., 0]
    mass = changed.sum(dim=(1, 2))
    assert torch.allclose(mass, torch.full((100,), 255.0), atol=0.5)
    down = (changed.sum(dim=2) * torch.arange(21)).sum(dim=1) / mass - 10
    across = (changed.sum(dim=1) * torch.arange(41)).sum(dim=1) / mass - 20
    assert float(down.abs().max()) <= 2.1 + 1e-3
    assert float(across.abs().max()) <= 4.1 + 1e-3
    assert float(down.std()) > 0.9
    assert float(across.std()) > 1.8


def test_a_turn_keeps_the_distance_from_the_middle() -> None:
    pictures = np.zeros((100, 41, 41, 1), np.uint8)
    pictures[:, 20, 35] = 255
    changed = Augmenter(Augmentation(rotate=30), 100, seed=0, epoch=0)(pictures, np.arange(100))[..., 0]
    mass = changed.sum(dim=(1, 2))
    y = (changed.sum(dim=2) * torch.arange(41)).sum(dim=1) / mass - 20
    x = (changed.sum(dim=1) * torch.arange(41)).sum(dim=1) / mass - 20
    assert torch.allclose((x**2 + y**2).sqrt(), torch.full((100,), 15.0), atol=0.5)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert float(angles.abs().max()) <= 30.5
    assert float(angles.min()) < -20
    assert float(angles.max()) > 20


def test_colour_leaves_shapes_and_grey_in_place() -> None:
    pictures = np.repeat(photos(50, 1), 3, axis=3)  # grey in three channels: hue and saturation cannot change it
    changed = Augmenter(Augmentation(colour=0.3), 50, seed=0, epoch=0)(pictures, np.arange(50))
    torch.testing.assert_close(changed[..., 0], changed[..., 1], rtol=0, atol=0.5)
    colours = Augmenter(Augmentation(colour=0.3), 50, seed=0, epoch=0)(photos(50), np.arange(50))
    assert not torch.allclose(colours, torch.from_numpy(photos(50)).float(), atol=10)


def test_nothing_chosen_is_nothing_changed() -> None:
    pictures = photos(5)
    unchanged = Augmenter(Augmentation(), 5, seed=0, epoch=0)(pictures, np.arange(5))
    torch.testing.assert_close(unchanged, torch.from_numpy(pictures).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flip", Augmentation(flip=True)),
        ("crop", Augmentation(crop=0.1)),
        (" flip , rotate = 5 ", Augmentation(flip=True, rotate=5.0)),
        ("colour=0.3,scale", Augmentation(colour=0.3, scale=0.1)),
    ],
)
def test_it_is_read_from_text(text: str, expected: Augmentation) -> None:
    assert Augmentation.parse(text) == expected
    assert Augmentation.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "flip=1", "blur", "rotate=x", "rotate=200", "crop=-1", "crop=nan", "flip,flip", "crop=", "scale=0.95"]
)
def test_text_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="cannot augment with"):
        Augmentation.parse(text)


def test_strength_scales_within_bounds() -> None:
    assert ALL.times(0) == Augmentation()
    assert ALL.times(0.5) == Augmentation(flip=True, crop=0.1, rotate=10, scale=0.1, colour=0.2)
    assert ALL.times(100) == Augmentation(flip=True, crop=0.5, rotate=180, scale=0.9, colour=1)
