"""What is served in the benchmarks: four bundles, made once and kept in `.bench/models`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing, TensorSpec
from rushhour.errors import BundleError
from rushhour.task import Task

ModelName = Literal["noop", "cnn", "cnn64", "article"]

SEED = 0
_SAMPLES = 32


def bundle_of(name: ModelName, folder: Path) -> Bundle:
    """The bundle, made if it is not there yet.

    - `noop`: a signature (32x32x3 pixels in, 10 numbers out) for an engine that computes nothing.
    - `cnn`: the article's network at 32x32x3 with 10 classes, 2.2M parameters, random weights.
    - `cnn64`: the same at 64x64x3.
    - `article`: the article's network as it is, 224x224x3, 103M parameters, int8. Takes a minute and 5 GB to make.
    """
    path = folder / name
    try:
        return Bundle.open(path)
    except BundleError:
        pass
    if name == "noop":
        from rushhour.testing.bundles import tiny_bundle

        return tiny_bundle(path, shape=(32, 32, 3), classes=10)
    if name in ("cnn", "cnn64"):
        return _exported(path, 32 if name == "cnn" else 64, 10)
    exported = _exported(path.with_name("article-f32"), 224, 1000)
    try:
        return _quantized(exported, path)
    finally:
        shutil.rmtree(exported.path, ignore_errors=True)  # 800 MB that nobody asks for again


def pictures(size: int, count: int, seed: int = SEED) -> NDArray[np.uint8]:
    """Random pictures `(count, size, size, 3)` that a network can tell apart: each a coarse pattern of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)


def _exported(path: Path, size: int, classes: int) -> Bundle:
    import torch

    from rushhour.models import article, export

    torch.manual_seed(SEED)
    network = article(input_size=size, classes=classes)
    last = network[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight.mul_(300)  # fresh weights say nearly the same of all pictures; answers are to differ
    return export(
        network,
        name=path.name,
        task=Task.classification(tuple(f"class {index}" for index in range(classes))),
        sample_spec=TensorSpec("image", "uint8", (size, size, 3)),
        preprocessing=Preprocessing(scale=1 / 255, layout="NHWC->NCHW"),
        source=None,
        lineage=(),
        samples=pictures(size, _SAMPLES),
        path=path,
    )


def _quantized(bundle: Bundle, path: Path) -> Bundle:
    from rushhour.compress.quantize import quantize
    from rushhour.data.arrays import from_splits
    from rushhour.data.dataset import Split
    from rushhour.progress import Silent

    split = Split(pictures(224, 64, seed=SEED + 1), np.arange(64, dtype=np.int64) % 1000)
    data = from_splits("random", split, split, split, bundle.manifest.task.classes)
    return quantize(bundle, data, path, calibration=64, seed=SEED, progress=Silent())
