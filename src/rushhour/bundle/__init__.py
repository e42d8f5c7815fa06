"""A bundle: one model on disk, in open formats only. ONNX + safetensors + JSON; never a pickle.

    NAME/
        bundle.json           signature, task, preprocessing, lineage, metrics, files with their SHA-256, content hash
        model.onnx            the whole graph, preprocessing included, dynamic batch
        weights.safetensors   the torch module's parameters, where there is one
        samples.safetensors   a few real inputs, for warm-up, load and checks
        tokenizer.json        makes samples of texts, where the model reads them
        answers.safetensors   the graph's outputs for them, which every engine that opens the bundle has to reproduce

Requests carry raw values (uint8 pixels); scaling, mean and layout are part of the graph, so a client cannot get them
wrong.

A dimension of a sample may be open (`OpenDimension`): the length of a text, the size of a picture. A request chooses it
within the manifest's bounds; tensors that share a dimension have the same size in it.
"""

from rushhour.bundle.folder import Bundle, check_folder, check_place, is_bundle, name_of, suggest_bundle
from rushhour.bundle.manifest import (
    ANSWERS,
    MODEL,
    SAMPLES,
    TOKENIZER,
    WEIGHTS,
    Decoding,
    FileRecord,
    Manifest,
    Preprocessing,
    Reshape,
    Source,
    Step,
    Text,
)
from rushhour.bundle.samples import columns_of, described, joined
from rushhour.bundle.signature import DType, OpenDimension, Signature, Sizes, TensorSpec, cut, own_sizes, padded_to
from rushhour.bundle.table import Column, Table
from rushhour.bundle.tiling import Tiling

__all__ = [
    "ANSWERS",
    "MODEL",
    "SAMPLES",
    "TOKENIZER",
    "WEIGHTS",
    "Bundle",
    "Column",
    "DType",
    "Decoding",
    "FileRecord",
    "Manifest",
    "OpenDimension",
    "Preprocessing",
    "Reshape",
    "Signature",
    "Sizes",
    "Source",
    "Step",
    "Table",
    "TensorSpec",
    "Text",
    "Tiling",
    "check_folder",
    "check_place",
    "columns_of",
    "cut",
    "described",
    "is_bundle",
    "joined",
    "name_of",
    "own_sizes",
    "padded_to",
    "suggest_bundle",
]
