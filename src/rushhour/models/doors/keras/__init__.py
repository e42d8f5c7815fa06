"""Keras models: what their file says is checked before Keras sees it, and torch's exporter makes the graph.

vocabulary   what a description may name
description  JSON, checked against it
archive      a `.keras` file: a zip
weights      its HDF5 file
files        both kinds of files, and what they say
loading      Keras on torch
exporting    a model -> its graph and its answers
child        the same in another process
door         `KerasDoor`
"""

from rushhour.models.doors.keras.door import KerasDoor

__all__ = ["KerasDoor"]
