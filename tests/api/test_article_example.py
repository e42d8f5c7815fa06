"""`examples/article`: the article's script trains in Keras as it stands, and what it saves is imported and tuned."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rushhour

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "article"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_from_the_script_to_a_plan(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for channel, kind in enumerate(("blue", "green", "red")):
        (photos / kind).mkdir(parents=True)
        for index in range(100):
            pixels = random.integers(0, 160, (20, 20, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 90
            Image.fromarray(pixels).save(photos / kind / f"{index}.png")
    words = [str(photos), "--out", "article.keras", "--side", "16", "--epochs", "6", "--batch", "16"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "train.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Found 240 images belonging to 3 classes" in done.stdout
    assert "model.predict, batch 1: " in done.stdout
    found = rushhour.import_model(tmp_path / "article.keras", data=photos, out=tmp_path / "imported")
    assert found.bundle.manifest.task.classes == ("blue", "green", "red")
    assert found.understood.preprocessing_from.startswith("0 to 1, by accuracy")
    assert found.understood.layers == {"Conv2d": 4, "Linear": 2}
    tuned = rushhour.tune(
        tmp_path / "article.keras", photos, slo="p99<500ms", max_accuracy_drop="30%", out=tmp_path / "tuned",
        budget="40s", recipes="none",
    )  # fmt: skip
    assert tuned.plan.model == "article"
    evidence = tuned.plan.evidence
    assert evidence is not None
    assert evidence.reference_accuracy is not None
    assert evidence.reference_accuracy > 0.9
    assert tuned.plan.variants
