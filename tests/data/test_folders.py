"""Folders as people have them: every kind of file, the usual layouts, and an account of what became of each file."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

from rushhour.bundle import Bundle, Decoding
from rushhour.data import Dataset, decoded, load
from rushhour.errors import DataError, RushhourError, TaskError
from rushhour.picture import decode, inspect_picture
from rushhour.system.storage import claimed

EVERYTHING = 10**9


def noise(height: int = 12, width: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def classes(folder: Path, *names: str, n: int = 12, mode: str = "RGB") -> Path:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(n):
            noise(seed=1000 * number + index + zlib.crc32(str(folder).encode()) % 997).convert(mode).save(
                folder / name / f"{index}.png"
            )
    return folder


def as_read(picture: Image.Image | bytes, channels: int = 3, form: str = "PNG", **options: Any) -> NDArray[np.uint8]:
    """What decoding makes of a picture, at its own size."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, form, **options)
        picture = file.getvalue()
    seen = inspect_picture(io.BytesIO(picture), max_pixels=EVERYTHING)
    into = np.empty((seen.height, seen.width, channels), np.uint8)
    decode(io.BytesIO(picture), into, max_pixels=EVERYTHING)
    return into


def count(data: Dataset) -> int:
    return len(data.train) + len(data.validation) + len(data.test)


def adds_up(data: Dataset, there: int) -> None:
    files = data.files
    assert files is not None
    assert files.total == there
    assert files.read == count(data)
    assert files.read + sum(files.left_out.values()) == there
    if files.left_out:
        assert data.notes[-1] == str(files)


# The data torture folder

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA", "RGBX"),
    "GIF": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}
ENDINGS = {"PNG": ".PNG", "JPEG": ".Jpg", "TIFF": ".TiF", "WEBP": ".webp", "GIF": ".gif", "BMP": ".BMP"}


def in_mode(mode: str, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    if mode.startswith("I"):
        deep = random.integers(0, 4096, (12, 16))
        return Image.fromarray(deep.astype({"I": np.int32, "I;16B": ">u2"}.get(mode, np.uint16)))
    if mode == "F":
        return Image.fromarray(random.random((12, 16), dtype=np.float32))
    if mode == "LAB":
        return Image.merge("LAB", noise(seed=seed).split())
    return noise(seed=seed).convert(mode)


def torture(folder: Path) -> tuple[int, int]:
    """Make it; return how many files there are, and how many of them no program can read."""
    good = classes(folder, "x", "y", n=20)
    made, hopeless = 40, 0
    for form, modes in MODES.items():
        for number, mode in enumerate(modes):
            path = good / "xy"[number % 2] / f"{form}-{mode.replace(';', '-')}{ENDINGS[form]}"
            in_mode(mode, number).save(path, form)
            made += 1
    exif = Image.Exif()
    for turn in range(1, 9):
        exif[0x0112] = turn
        noise(seed=50 + turn).save(good / "x" / f"turned-{turn}.jpeg", exif=exif)
    noise(seed=70).quantize(16).save(good / "x" / "see-through.png", transparency=3)
    noise(seed=71).save(good / "x" / "frames.gif", save_all=True, append_images=[noise(seed=72)])
    noise(seed=73).save(good / "y" / "frames.tiff", save_all=True, append_images=[noise(seed=74)])
    noise(seed=75).save(good / "y" / "progressive.jfif", "JPEG", progressive=True)
    noise(seed=76).save(good / "y" / "old.jpe", "JPEG")
    for number, name in enumerate(
        (" space .png", "line\nbreak.png", "-rf.png", "ä ö 猫.png", "a.b.c.png", "*?[x].png")
    ):
        noise(seed=80 + number).save(good / "y" / name)
    odd = os.fsencode(good / "y") + b"/bytes-\xff\xfe.png"
    buffer = io.BytesIO()
    noise(seed=90).save(buffer, "PNG")
    Path(os.fsdecode(odd)).write_bytes(buffer.getvalue())
    (good / "x" / "deeper" / "still").mkdir(parents=True)
    noise(seed=91).save(good / "x" / "deeper" / "still" / "nested.png")
    (good / "x" / "link.png").symlink_to(good / "x" / "0.png")
    (good / "y" / "elsewhere").symlink_to(good / "x" / "deeper")
    made += 8 + 1 + 2 + 2 + 6 + 1 + 1 + 1 + 1  # the last is nested.png once more, through the link

    bad = {
        "empty.png": b"", "text.png": b"hello", "cut.png": buffer.getvalue()[:200],
        "cut.jpg": (good / "y" / "old.jpe").read_bytes()[:300], "nothing.tiff": b"II*\0", "zeros.webp": bytes(500),
    }  # fmt: skip
    for name, content in bad.items():
        (good / "x" / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.new("1", (30_000, 5_000)).save(good / "x" / "huge.png")
    made, hopeless = made + len(bad) + 1, len(bad) + 1

    for name in ("notes.txt", "raw.heic", "labels.CSV", "Thumbs.db", ".hidden.png", "._0.png", "README"):
        (good / "y" / name).write_bytes(b"x")
    (good / ".git" / "objects").mkdir(parents=True)
    (good / ".git" / "objects" / "a").write_bytes(b"x")
    (good / "__MACOSX" / "x").mkdir(parents=True)
    (good / "__MACOSX" / "x" / "._0.png").write_bytes(b"x")
    (good / "top.png").write_bytes(buffer.getvalue())
    (good / "y" / "gone.png").symlink_to(folder / "nowhere.png")
    (good / "y" / "circle").symlink_to(good / "y")
    (good / "y" / "up").symlink_to(good)
    (good / "around").symlink_to(good)
    os.mkfifo(good / "y" / "pipe.png")
    return made + 7 + 2 + 1 + 1 + 3 + 1, hopeless


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_read_and_what_is_left_out_add_up(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        monkeypatch.setattr(decoded, "WORTH_CACHING", 0)
        monkeypatch.setenv("RUSHHOUR_DATA", str(tmp_path / "cache"))
    there, hopeless = torture(tmp_path / "torture")
    heard: list[DataError] = []
    for _ in range(1 + cached):
        heard.clear()
        data = load(str(tmp_path / "torture"), on_corrupt=heard.append)
        adds_up(data, there)
        assert data.files is not None
        unreadable = data.files.left_out["unreadable"]
        assert unreadable == len(heard) == hopeless
        assert not any("\n" in str(error) or "\udcff" in str(error) for error in heard)
        assert {"hidden": 5, "outside class folders": 1, "broken links": 1, "circular links": 3}.items() <= (
            data.files.left_out.items()
        )
        said = " | ".join(data.notes)
        for words in ("several frames", "16 bits of grey", "4095", "in floats", "are deeper"):
            assert words in said
        assert said.encode()  # can be written anywhere
    with pytest.raises(DataError, match=r"cannot read the picture .* \(and \d more\)") as caught:
        load(str(tmp_path / "torture"), size=(8, 8))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_that_are_no_text_become_classes_that_can_be_written(tmp_path: Path) -> None:
    for number, name in enumerate((b"caf\xe9", b"dog", "猫".encode())):
        folder = tmp_path / "d" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for index in range(10):
            noise(seed=number * 10 + index).save(folder / f"{index}.png")
    data = load(str(tmp_path / "d"))
    assert data.task.classes == ("caf\\xe9", "dog", "猫")
    assert ",".join(data.task.classes).encode()


def test_two_folders_that_look_alike_are_not_one(tmp_path: Path) -> None:
    """The pictures of the first were lost, and not counted."""
    folder = classes(tmp_path / "d", "caf\u00e9", "cafe\u0301", "dog")
    with pytest.raises(DataError, match="two folders 'caf\u00e9': they differ only in how"):
        load(str(folder))


def test_pictures_in_two_classes_or_in_two_parts_are_said(tmp_path: Path) -> None:
    folder = classes(tmp_path / "d", "x", "y")
    for index in range(3):
        (folder / "y" / f"again-{index}.png").write_bytes((folder / "x" / f"{index}.png").read_bytes())
    said = "3 pictures are in several classes, such as x/0.png and y/again-0.png: a picture has one label"
    assert said in load(str(folder)).notes
    parts = tmp_path / "parts"
    for part in ("train", "val"):
        classes(parts / part, "x", "y")
    (parts / "val" / "x" / "again.png").write_bytes((parts / "train" / "x" / "0.png").read_bytes())
    notes = " ".join(load(str(parts)).notes)
    assert "pictures of the part validation are in train too: they show nothing new" in notes


# Values


def test_grey_of_more_than_8_bits_is_scaled_by_what_the_whole_folder_fills(tmp_path: Path) -> None:
    for number, (peak, white) in enumerate(((4095, 4095), (900, 1023), (255, 255), (40_000, 65_535), (16_000, 16_383))):
        folder = tmp_path / str(number)
        for name, level in (("dark", peak // 4), ("light", peak)):
            (folder / name).mkdir(parents=True)
            for index in range(10):
                Image.fromarray(np.full((3, 3), level - index, np.uint16)).save(folder / name / f"{index}.png")
        data = load(str(folder))
        assert data.preprocessing.decoding == Decoding(deep=white)
        brightest = max(part.inputs.max() for part in (data.train, data.validation, data.test))
        assert abs(int(brightest) - round(peak * 255 / white)) <= 1


def test_a_bright_picture_that_was_not_looked_at_first_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushhour.data.probing._PROBED", 2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(np.full((3, 3), 200 + index, np.uint16)).save(tmp_path / name / f"{index}.png")
    Image.fromarray(np.full((3, 3), 3000, np.uint16)).save(tmp_path / "b" / "7.png")
    data = load(str(tmp_path))
    assert data.preprocessing.decoding == Decoding(deep=4095)
    values = np.concatenate([part.inputs.reshape(-1) for part in (data.train, data.validation, data.test)])
    assert sorted(set(values.tolist()))[-1] == round(3000 * 255 / 4095)
    assert set(values.tolist()) <= {12, 13, 187}


@pytest.mark.parametrize(("peak", "white"), [(1.0, 1.0), (0.5, 1.0), (255.0, 255.0), (200.0, 255.0), (4000.0, 4095.0)])
def test_floats_are_scaled_by_what_the_whole_folder_fills(tmp_path: Path, peak: float, white: float) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            ramp = np.linspace(0, peak, 16, dtype=np.float32).reshape(4, 4) * (1 if name == "a" else 0.5 - index / 100)
            Image.fromarray(ramp).save(tmp_path / name / f"{index}.tiff")
    data = load(str(tmp_path))
    assert data.preprocessing.decoding == Decoding(real=white)
    brightest = max(int(part.inputs.max()) for part in (data.train, data.validation, data.test))
    assert brightest == round(peak * 255 / white)
    assert f"{white:g} is taken as white" in " ".join(data.notes)


@pytest.mark.parametrize("peak", [0.01, 3.7, -1.0, np.nan, 1e6])
def test_floats_that_are_no_picture_are_refused(tmp_path: Path, peak: float) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(np.full((4, 4), peak, np.float32)).save(tmp_path / name / f"{index}.tiff")
    with pytest.raises(DataError, match=r"value of white|values run from") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_colours_of_16_bits_that_fill_12_are_refused_not_black() -> None:
    # Pillow writes none: a TIFF of 16 bits for each colour, uncompressed, by hand
    def tiff(peak: int) -> bytes:
        pixels = np.full((2, 2, 3), peak, "<u2")
        pixels[0, 0] = 0
        tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14),
                (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24)]  # fmt: skip
        head = b"II*\0" + (38).to_bytes(4, "little") + (16).to_bytes(2, "little") * 3
        body = pixels.tobytes()
        directory = len(tags).to_bytes(2, "little") + b"".join(
            tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + n.to_bytes(4, "little") + v.to_bytes(4, "little")
            for tag, kind, n, v in tags
        )
        return head + body + directory + bytes(4)

    into = np.empty((2, 2, 3), np.uint8)
    assert decode(io.BytesIO(tiff(4095)), into, max_pixels=EVERYTHING).cut == 15
    assert decode(io.BytesIO(tiff(65_535)), into, max_pixels=EVERYTHING).cut == 255
    assert into[1, 1].tolist() == [255, 255, 255]
    files = [Path(f"{index}.tiff") for index in range(3)]
    seen = [decode(io.BytesIO(tiff(peak)), into, max_pixels=EVERYTHING) for peak in (4095, 900, 16_000)]
    with pytest.raises(DataError, match="nearly black"):
        decoded._check_colours(seen, files)
    bright = decode(io.BytesIO(tiff(60_000)), into, max_pixels=EVERYTHING)
    decoded._check_colours([*seen[:2], bright], files)


def test_what_is_transparent_is_white() -> None:
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red.putpixel((0, 0), (255, 0, 0, 0))
    assert as_read(red).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert as_read(red, form="WEBP", lossless=True).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((0, 0), (0, 0))
    assert as_read(grey, 1)[..., 0].tolist() == [[255, 0]]
    assert as_read(grey)[..., 1].tolist() == [[255, 0]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    assert as_read(palette, transparency=0).tolist() == [[[255] * 3, [9] * 3]]
    assert as_read(palette, form="GIF", transparency=0).tolist() == [[[255] * 3, [9] * 3]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (4, 5, 6))
    assert as_read(keyed, transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert abs(int(as_read(half)[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_format_is_turned_as_its_exif_says(form: str, turn: int) -> None:
    if form == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    wide = Image.new("L", (32, 16), 0)
    wide.paste(255, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = turn
    read = as_read(wide.convert("RGB"), form=form, exif=exif)
    assert read.shape == ((32, 16, 3) if turn > 4 else (16, 32, 3))
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    top, left = corners[turn]
    height, width = read.shape[0] // 2, read.shape[1] // 2
    means = read[..., 0].reshape(2, height, 2, width).mean(axis=(1, 3))
    assert divmod(int(means.argmax()), 2) == (top, left)


# Sizes


def test_a_size_that_nobody_asked_for_is_said(tmp_path: Path) -> None:
    folder = classes(tmp_path / "d", "x", "y")
    assert not any("size" in note for note in load(str(folder)).notes)
    noise(48, 16).save(folder / "x" / "tall.png")
    noise(24, 32).save(folder / "x" / "large.png")
    data = load(str(folder))
    assert data.sample_shape == (12, 16, 3)
    assert "2 of 26 pictures have another size than 12x16" in " ".join(data.notes)
    assert "stretches 1 of them; --size HxW" in " ".join(data.notes)
    assert not any("size" in note for note in load(str(folder), size=(12, 12)).notes), "that was asked for"


def test_photographs_of_many_sizes_get_one_that_can_be_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            noise(300 + 30 * index, 400, seed=index + 100 * (name == "b")).save(tmp_path / name / f"{index}.jpg")
    data = load(str(tmp_path))
    assert max(data.sample_shape[:2]) == 224
    assert load(str(tmp_path), square=True).sample_shape == (224, 224, 3)
    alike = tmp_path / "alike"
    for name in ("a", "b"):
        (alike / name).mkdir(parents=True)
        for index in range(6):
            noise(600, 800, seed=index).save(alike / name / f"{index}.jpg")
    assert load(str(alike)).sample_shape == (168, 224, 3)
    assert "resized to it; --size" in " ".join(load(str(alike)).notes), "the proportions stay"


# Layouts


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Val", "EVAL"])
def test_a_validation_part_by_any_name_is_read(tmp_path: Path, name: str) -> None:
    for part, n in (("train", 12), (name, 5), ("test", 6)):
        classes(tmp_path / part, "x", "y", n=n)
    data = load(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 10, 12)
    adds_up(data, 46)


@pytest.mark.parametrize("names", [("train", "val"), ("training", "dev"), ("Train", "Validation"), ("train", "valid")])
def test_a_part_that_is_missing_is_held_out_of_train(tmp_path: Path, names: tuple[str, str]) -> None:
    for part, n in zip(names, (20, 5), strict=True):
        classes(tmp_path / part, "x", "y", n=n)
    data = load(str(tmp_path))
    assert len(data.validation) == 10
    assert len(data.train) + len(data.test) == 40
    assert len(data.test) >= 1
    assert "there is no test part: about a tenth of train is held out" in " ".join(data.notes)
    adds_up(data, 50)


def test_layouts_that_people_have(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    classes(alone / "training", "x", "y", n=15)
    assert count(load(str(alone))) == 30, "all three parts come out of it"

    beside = tmp_path / "beside"
    for part in ("train", "testing", "extra"):
        classes(beside / part, "x", "y", n=6)
    data = load(str(beside))
    assert "in extra/, which is not a part 12" in data.notes[-1]
    adds_up(data, 36)

    flat = tmp_path / "flat"
    for part in ("train", "val"):
        classes(flat / part, "x", "y", n=10)
    classes(flat, "test", n=7)
    data = load(str(flat))
    assert "test/ has no class folders: it is left out" in data.notes
    adds_up(data, 47)

    fewer = tmp_path / "fewer"
    for part in ("train", "val", "test"):
        classes(fewer / part, *("xyz" if part == "train" else "xz"), n=4)
    data = load(str(fewer))
    assert data.task.classes == ("x", "y", "z")
    assert set(data.test.targets) == {0, 2}
    assert "val/ has no pictures of y" in " ".join(data.notes)

    trains = classes(tmp_path / "vehicles", "car", "bus", "train", n=6)
    assert load(str(trains)).task.classes == ("bus", "car", "train"), "a train can be a class"


def test_layouts_that_cannot_be_meant_are_refused_with_the_right_advice(tmp_path: Path) -> None:
    for part in ("val", "test"):
        classes(tmp_path / "no train" / part, "x", "y", n=3)
    with pytest.raises(DataError, match="has test, val, but no folder train"):
        load(str(tmp_path / "no train"))
    for part in ("train", "val", "valid"):
        classes(tmp_path / "twice" / part, "x", "y", n=3)
    with pytest.raises(DataError, match="2 folders for validation: val, valid"):
        load(str(tmp_path / "twice"))
    classes(tmp_path / "wrapped" / "images", "x", "y", n=6)
    with pytest.raises(TaskError, match=r"only the class 'images'.*name .*wrapped/images itself"):
        load(str(tmp_path / "wrapped"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(b"")
    with pytest.raises(RushhourError, match="has no classes"):
        load(str(tmp_path / "files"))


def test_added_photographs_move_none_of_yesterdays(tmp_path: Path) -> None:
    def names(folder: Path) -> dict[str, set[bytes]]:
        data = load(str(folder))
        return {part: {each.tobytes() for each in getattr(data, part).inputs} for part in ("train", "test")}

    folder = classes(tmp_path / "d", "x", "y", n=40)
    before = names(folder)
    for index in range(100):
        noise(seed=5000 + index).save(folder / "xy"[index % 2] / f"new-{index}.png")
    (folder / "x").rename(folder / "a new name")
    (folder / "y" / "0.png").rename(folder / "y" / "zz.png")
    after = names(folder)
    assert before["test"] <= after["test"]
    assert before["train"] <= after["train"]
    assert not after["train"] & after["test"]
    other_size = load(str(folder), size=(5, 5))
    assert len(other_size.test) == len(after["test"]), "nor does another size"


def test_decoding_says_how_far_it_is(tmp_path: Path) -> None:
    """It was silent for minutes, without an estimate of the time that is left."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("L", (4, 4), index).save(tmp_path / name / f"{index}.png")
    heard: list[tuple[int, int]] = []
    load(str(tmp_path), on_decoded=lambda done, total: heard.append((done, total)))
    assert heard == [(16, 40), (32, 40), (40, 40)]


def test_what_rushhour_made_in_the_folder_is_no_class(tmp_path: Path, tiny: Bundle) -> None:
    """`--out` inside the folder of the data: the second training had a class more, or an empty one."""
    folder = classes(tmp_path / "photos", "cat", "dog")
    tiny.copy_to(folder / "model")
    with claimed(folder / "model-training"):
        noise().save(folder / "model-training" / "chart.png")
        (folder / "model-training" / "curves.jsonl").touch()
    data = load(str(folder))
    assert data.task.classes == ("cat", "dog")
    assert data.files is not None
    assert data.files.left_out == {"made by Rushhour": len(list((folder / "model").iterdir())) + 3}
    adds_up(data, sum(path.is_file() for path in folder.rglob("*")))


def test_a_file_of_another_kind_is_there_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_text("1,2")
    with pytest.raises(DataError, match=r"cannot read the data .*data\.xlsx: \.xlsx is no kind of data .*numpy\.savez"):
        load(str(tmp_path / "data.xlsx"))
