"""Compression: recipes that turn a bundle into a smaller one, judged on the compiled artefact."""

from rushhour.compress.compress import compress
from rushhour.compress.distil import Distil, distil
from rushhour.compress.judge import judge, outputs_of, too_few, why_outside
from rushhour.compress.lowrank import LowRank
from rushhour.compress.prune import Prune
from rushhour.compress.quantize import is_plain, quantize, quantize_for_all
from rushhour.compress.recipe import Precision, Quantize, Recipe, Store, apply, ladder
from rushhour.compress.speed import Ratio, Speed, bench_artefacts, compare_speed
from rushhour.compress.weights import compress_weights, halve_weights

__all__ = [
    "Distil",
    "LowRank",
    "Precision",
    "Prune",
    "Quantize",
    "Ratio",
    "Recipe",
    "Speed",
    "Store",
    "apply",
    "bench_artefacts",
    "compare_speed",
    "compress",
    "compress_weights",
    "distil",
    "halve_weights",
    "is_plain",
    "judge",
    "ladder",
    "outputs_of",
    "quantize",
    "quantize_for_all",
    "too_few",
    "why_outside",
]
