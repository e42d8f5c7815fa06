"""A network as it is served, in torch, and its way to a bundle and back."""

from rushhour.models.deployed.graph import exported_graph, graph_of_program, strip_origin
from rushhour.models.deployed.loading import load_deployed, load_weights
from rushhour.models.deployed.module import Deployed, Inputs, Preprocess, tensors_of
from rushhour.models.deployed.outputs import Meaning, as_logits, main_output, named_outputs
from rushhour.models.deployed.sealing import export, try_export

__all__ = [
    "Deployed",
    "Inputs",
    "Meaning",
    "Preprocess",
    "as_logits",
    "export",
    "exported_graph",
    "graph_of_program",
    "load_deployed",
    "load_weights",
    "main_output",
    "named_outputs",
    "strip_origin",
    "tensors_of",
    "try_export",
]
