"""Compression: recipes that turn a bundle into a smaller one, judged on the compiled artefact."""

from rushhour.compress.judge import judge, outputs_of
from rushhour.compress.quantize import quantize
from rushhour.compress.speed import Ratio, Speed, bench_artefacts, compare_speed
from rushhour.compress.weights import compress_weights, halve_weights

__all__ = [
    "Ratio",
    "Speed",
    "bench_artefacts",
    "compare_speed",
    "compress_weights",
    "halve_weights",
    "judge",
    "outputs_of",
    "quantize",
]
