"""Compression: recipes that turn a bundle into a smaller one, judged on the compiled artefact."""

from rushhour.compress.judge import judge, outputs_of
from rushhour.compress.quantize import quantize

__all__ = ["judge", "outputs_of", "quantize"]
