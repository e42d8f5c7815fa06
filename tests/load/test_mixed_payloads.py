"""Requests of samples that differ in length: each has its own, and no padding but that of its own rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rushhour.errors import LoadError
from rushhour.load import payloads
from rushhour.load.target import Interface, Target
from rushhour.testing.bundles import tiny_text_bundle


def shapes(requests: list[bytes]) -> list[list[int]]:
    found = []
    for request in requests:
        body = request.partition(b"\r\n\r\n")[2]
        header, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        sizes = [each["shape"] for each in header["inputs"]]
        assert sizes[0] == sizes[1]
        found.append(sizes[0])
    return found


def test_each_request_has_the_length_of_its_longest_sample(tmp_path: Path) -> None:
    bundle = tiny_text_bundle(tmp_path / "text")
    signature, samples = bundle.manifest.signature, bundle.samples()
    target = Target("http://127.0.0.1:1", "127.0.0.1", 1, "", model="text", interface=Interface.of(signature))
    alone = shapes(payloads(target, samples, signature=signature))
    assert {size for _, size in alone} == {size for (size,) in bundle.sizes()}
    assert {rows for rows, _ in alone} == {1}
    pairs = shapes(payloads(target, samples, rows=2, signature=signature))
    assert {rows for rows, _ in pairs} == {2}
    assert np.mean([size for _, size in pairs]) > np.mean([size for _, size in alone])
    padded = shapes(payloads(target, samples))
    assert {size for _, size in padded} == {max(size for (size,) in bundle.sizes())}


def test_random_values_need_a_size(tmp_path: Path) -> None:
    signature = tiny_text_bundle(tmp_path / "text").manifest.signature
    target = Target("http://127.0.0.1:1", "127.0.0.1", 1, "", model="text", interface=Interface.of(signature))
    with pytest.raises(LoadError, match="--shape tokens:SIZE") as refused:
        payloads(target)
    assert "\n" not in str(refused.value)
