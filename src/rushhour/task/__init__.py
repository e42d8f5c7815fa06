"""Tasks: the form of a model's output, its metric (numpy, higher is better), and how an answer is read.

The losses are in `train/`; everything here runs without torch, on the outputs of any engine.
"""

from rushhour.task.boxes import MOST, STRIDE, Detection, overlaps
from rushhour.task.intervals import Z, bootstrap, wilson
from rushhour.task.kind import Head, Kind, LossName, Places, Spatial, ensure_kind, load_kind, outputs_of, register
from rushhour.task.maps import VOID, Segmentation
from rushhour.task.outputs import are_chances, are_probabilities
from rushhour.task.tags import OUTSIDE, PADDING, Tagging
from rushhour.task.task import Scaling, Task

__all__ = [
    "MOST",
    "OUTSIDE",
    "PADDING",
    "STRIDE",
    "VOID",
    "Detection",
    "Head",
    "Kind",
    "LossName",
    "Places",
    "Scaling",
    "Segmentation",
    "Spatial",
    "Tagging",
    "Task",
    "Z",
    "are_chances",
    "are_probabilities",
    "bootstrap",
    "ensure_kind",
    "load_kind",
    "outputs_of",
    "overlaps",
    "register",
    "wilson",
]
