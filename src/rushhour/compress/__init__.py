"""Compression: recipes that turn a bundle into a smaller one, judged on the compiled bundle."""

from rushhour.compress.builder import Builder, Work, first_missing
from rushhour.compress.compress import compress
from rushhour.compress.distil import Distil, distil
from rushhour.compress.judge import judge, named_inputs, outputs_of, too_few, why_outside
from rushhour.compress.lowrank import LowRank
from rushhour.compress.prune import Prune
from rushhour.compress.quantize import Quantize, Target, is_plain, quantize, quantize_for_all
from rushhour.compress.recipe import Recipe, default_recipes
from rushhour.compress.run import apply
from rushhour.compress.speed import Ratio, Speed, bench_artefacts, compare_speed
from rushhour.compress.store import Maker, Store, maker
from rushhour.compress.weights import ReducedPrecision, compress_weights, halve_weights

__all__ = [
    "Builder",
    "Distil",
    "LowRank",
    "Maker",
    "Prune",
    "Quantize",
    "Ratio",
    "Recipe",
    "ReducedPrecision",
    "Speed",
    "Store",
    "Target",
    "Work",
    "apply",
    "bench_artefacts",
    "compare_speed",
    "compress",
    "compress_weights",
    "default_recipes",
    "distil",
    "first_missing",
    "halve_weights",
    "is_plain",
    "judge",
    "maker",
    "named_inputs",
    "outputs_of",
    "quantize",
    "quantize_for_all",
    "too_few",
    "why_outside",
]
