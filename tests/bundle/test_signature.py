"""Open dimensions of a signature: what a manifest may say, and what samples of different sizes are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from rushhour.bundle import Bundle, OpenDimension, Signature, TensorSpec, cut, own_sizes, padded_to
from rushhour.errors import BundleError
from rushhour.testing.bundles import tiny_bundle, tiny_text_bundle

IDS, MASK = TensorSpec("ids", "int64", (16,)), TensorSpec("mask", "int64", (16,))
TAGS = TensorSpec("tags", "float32", (16, 2))
LENGTH = OpenDimension("length", 16, {"ids": 0, "mask": 0, "tags": 0}, smallest=2, padding={"ids": 9, "mask": 0})
TEXT = Signature(inputs=(IDS, MASK), outputs=(TAGS,), open=(LENGTH,))


def test_a_signature_without_open_dimensions_is_written_as_before() -> None:
    fixed = Signature(inputs=(IDS,), outputs=(TAGS,))
    assert set(json.loads(msgspec.json.encode(fixed))) == {"inputs", "outputs"}
    assert fixed.dimensions == ()
    assert fixed.declared(IDS) == [16]
    assert fixed.shape(TAGS, ()) == (16, 2)
    assert fixed.row_bytes(TAGS, ()) == TAGS.row_bytes == 16 * 2 * 4


def test_shapes_follow_the_sizes_of_a_request() -> None:
    assert TEXT.declared(TAGS) == [-1, 2]
    assert TEXT.described(TAGS) == "[-1, 2 to 16, 2]"
    assert TEXT.shape(TAGS, (5,)) == (5, 2)
    assert TEXT.row_bytes(IDS, (5,)) == 40
    assert IDS.row_bytes == 128  # the largest
    assert TEXT.sizes_of({"ids": np.zeros((3, 7)), "mask": np.zeros((3, 7))}) == (7,)
    decoded = msgspec.json.decode(msgspec.json.encode(TEXT), type=Signature)
    assert decoded == TEXT


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"axes": {"ids": 1, "mask": 0}}, "the axis 1 of 'ids'"),
        ({"axes": {"other": 0}}, "the axis 0 of 'other'"),
        ({"largest": 8}, "up to 8"),
        ({"axes": {"tags": 0}, "padding": {}}, "no input has"),
        ({"padding": {"ids": 0}}, "names other inputs than ids, mask"),
        ({"smallest": 17}, "is above 16"),
        ({"smallest": 0}, "smallest"),
        ({"largest": -1}, "largest"),
        ({"name": ""}, "name"),
    ],
)
def test_a_dimension_that_fits_no_tensor_is_refused(changes: dict[str, Any], says: str) -> None:
    fields = msgspec.to_builtins(LENGTH) | changes
    content = msgspec.to_builtins(TEXT) | {"open": [fields]}
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.json.decode(json.dumps(content), type=Signature)


def test_a_tensor_that_would_be_too_large_is_refused_although_it_is_open() -> None:
    content = {"name": "ids", "dtype": "int64", "shape": [2**31]}
    with pytest.raises(msgspec.ValidationError, match="GiB"):
        msgspec.json.decode(json.dumps(content), type=TensorSpec)


def test_only_one_dimension_may_be_padded() -> None:
    spec = TensorSpec("x", "float32", (4, 4))
    both = tuple(OpenDimension(name, 4, {"x": axis}, padding={"x": 0}) for axis, name in enumerate(("h", "w")))
    with pytest.raises(ValueError, match="more than one"):
        Signature(inputs=(spec,), outputs=(TAGS,), open=both)


def test_the_own_size_of_a_sample_ends_with_its_last_value_that_is_no_padding() -> None:
    ids = np.array([[5, 6, 9, 9, 9], [9, 9, 9, 9, 9], [5, 9, 6, 9, 9], [5, 5, 5, 5, 5]])
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    samples = {"ids": ids, "mask": mask}
    assert own_sizes(TEXT, samples) == [(3,), (2,), (3,), (5,)]
    short = cut(TEXT, {name: array[:1] for name, array in samples.items()}, (3,))
    assert {name: array.tolist() for name, array in short.items()} == {"ids": [[5, 6, 9]], "mask": [[1, 1, 1]]}
    back = padded_to(TEXT, short, (5,))
    np.testing.assert_array_equal(back["ids"], ids[:1])
    np.testing.assert_array_equal(back["mask"], mask[:1])


def test_a_picture_of_any_size_is_not_taken_for_one_of_a_fixed_size() -> None:
    image = TensorSpec("image", "uint8", (64, 64, 3))
    sides = tuple(OpenDimension(name, 64, {"image": axis}) for axis, name in enumerate(("height", "width")))
    assert Signature(inputs=(image,), outputs=(TAGS,)).picture == image
    assert Signature(inputs=(image,), outputs=(TAGS,), open=sides).picture is None


def test_a_bundle_keeps_its_open_dimensions_and_the_lengths_of_its_samples(tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_text_bundle(tmp_path / "text").path)
    (dimension,) = bundle.manifest.signature.dimensions
    assert (dimension.name, dimension.smallest, dimension.largest) == ("length", 1, 32)
    sizes = bundle.sizes()
    assert len(set(sizes)) > 3
    assert max(sizes) == (24,)
    assert [int(row.sum()) for row in bundle.samples()["mask"]] == [length for (length,) in sizes]
    assert "`tokens` int64 `(n, 1 to 32)`" in (bundle.path / "README.md").read_text()


def test_earlier_versions_open_a_bundle_of_fixed_sizes_and_are_told_of_others(tmp_path: Path) -> None:
    assert tiny_bundle(tmp_path / "fixed").manifest.schema == 2
    assert tiny_text_bundle(tmp_path / "open").manifest.schema == 3


def test_a_manifest_that_was_changed_to_other_bounds_is_damaged(tmp_path: Path) -> None:
    bundle = tiny_text_bundle(tmp_path / "text")
    shutil.copytree(bundle.path, tmp_path / "other")
    file = tmp_path / "other" / "bundle.json"
    content = json.loads(file.read_text())
    content["signature"]["open"][0]["largest"] = 10**12
    file.write_text(json.dumps(content))
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path / "other")
