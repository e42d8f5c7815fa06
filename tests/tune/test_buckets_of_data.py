"""Buckets of a Plan come from the lengths in the data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from rushhour.plan import Policy
from rushhour.testing.bundles import tiny_bundle, tiny_text_bundle
from rushhour.tune.space import candidates, padded_lengths


def test_buckets_are_those_of_the_data_and_of_no_model_of_one_size(tmp_path: Path) -> None:
    text = tiny_text_bundle(tmp_path / "text")
    data = np.zeros(60, [("tokens", np.int64, (32,)), ("mask", np.int64, (32,))])
    for row in range(60):
        data["mask"][row, : (5 if row % 2 else 20)] = 1
    lengths = padded_lengths(text, data)
    assert sorted(set(lengths)) == [5, 20]
    assert {each.policy.buckets for each in candidates({"reference": text}, 2, lengths)} == {(5, 20, 32)}
    own = {each.policy.buckets for each in candidates({"reference": text}, 2)}
    assert all(buckets[-1] == 32 for buckets in own if not isinstance(buckets, msgspec.UnsetType))
    fixed = tiny_bundle(tmp_path / "fixed")
    assert padded_lengths(fixed, np.zeros((3, 4, 4, 1), np.uint8)) == []
    assert {each.policy.buckets for each in candidates({"reference": fixed}, 2)} == {msgspec.UNSET}


def test_a_policy_without_buckets_is_written_as_before() -> None:
    assert b"buckets" not in msgspec.json.encode(Policy())
    policy = Policy(buckets=(8, 32))
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy
