"""What the conversion of an operator is: a function that adds it to a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rushhour.models.converted.builder import Builder, Value
from rushhour.models.converted.node import Node

Operator = Callable[[Builder, Node], Value | Sequence[Value]]
"""Gives the operator's output, or its outputs in order. Raises `Unsupported` with the reason."""
