"""Runs to export: a tiny bundle as reference, another as what the Plan serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from runs import make_plan

from rushhour.plan import PLAN, Policy, Variant
from rushhour.system.machine import describe
from rushhour.testing.bundles import tiny_bundle

MODEL = "parts"


def run_of(folder: Path, *, cores: int = 2, policy: Policy | None = None, **variant: Any) -> Path:
    """A run as tuning leaves it.

    Args:
        folder: of the run.
        cores: of the machine that it was measured on.
        policy: of the plan.
        variant: in place of OpenVINO in f32.
    """
    tiny_bundle(folder / "bundles" / "reference", name=MODEL, seed=1)
    kind: Any = "int8" if variant.get("precision") == "int8" else "f32"
    served = tiny_bundle(folder / "bundles" / "best", name=f"{MODEL}-best", precision=kind)
    chosen = {"name": "best", "bundle": "bundles/best", "bundle_hash": served.manifest.hash} | variant
    make_plan(
        variants=(Variant(**{"engine": "openvino", "precision": "f32", **chosen}),),
        policy=policy or Policy(streams=cores, max_batch=8, deadline_ms=45.0),
        model=MODEL,
        machine=msgspec.structs.replace(describe(), cores=cores),
    ).save(folder / PLAN)
    (folder / "measurements.jsonl").write_text("")
    return folder
