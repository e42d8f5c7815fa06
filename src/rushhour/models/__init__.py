"""Reference networks (torch), how a network is named and built, and how it becomes a bundle.

A network takes float32 in torch's layout and gives logits or values; `deployed` turns the wire's samples
into that and its outputs into the task's answer.
"""

from rushhour.models.article import article
from rushhour.models.converted import converted
from rushhour.models.deepfm import deepfm
from rushhour.models.deployed import Deployed, Inputs, Preprocess, export, load_deployed, tensors_of
from rushhour.models.detector import detector
from rushhour.models.doors import bring
from rushhour.models.fields import HIDES
from rushhour.models.fits import check_fits
from rushhour.models.imported import from_onnx
from rushhour.models.importing import import_arrival, import_onnx, is_imported
from rushhour.models.kernels import kernels
from rushhour.models.minilm import minilm, minilm_bundle
from rushhour.models.mlp import mlp
from rushhour.models.reshape import split_dense
from rushhour.models.residual import residual
from rushhour.models.signal import signal
from rushhour.models.source import build, forward_names, resized, source_for
from rushhour.models.structure import Structure, code_of, structure_of
from rushhour.models.tabular import tabular
from rushhour.models.tagger import tagger
from rushhour.models.text_classifier import text_classifier, text_classifier_bundle
from rushhour.models.trust import trusted_factories
from rushhour.models.unet import unet

__all__ = [
    "HIDES",
    "Deployed",
    "Inputs",
    "Preprocess",
    "Structure",
    "article",
    "bring",
    "build",
    "check_fits",
    "code_of",
    "converted",
    "deepfm",
    "detector",
    "export",
    "forward_names",
    "from_onnx",
    "import_arrival",
    "import_onnx",
    "is_imported",
    "kernels",
    "load_deployed",
    "minilm",
    "minilm_bundle",
    "mlp",
    "residual",
    "resized",
    "signal",
    "source_for",
    "split_dense",
    "structure_of",
    "tabular",
    "tagger",
    "tensors_of",
    "text_classifier",
    "text_classifier_bundle",
    "trusted_factories",
    "unet",
]
