"""A bundle: one model on disk, in open formats only. ONNX + safetensors + JSON; never a pickle.

    NAME/
        bundle.json           signature, task, preprocessing, lineage, metrics, files with their SHA-256, content hash
        model.onnx            the whole graph, preprocessing included, dynamic batch
        weights.safetensors   the torch module's parameters, where there is one
        samples.safetensors   a few real inputs, for warm-up, load and checks
        answers.safetensors   the graph's outputs for them, which every engine that opens the bundle has to reproduce

Requests carry raw values (uint8 pixels); scaling, mean and layout are part of the graph, so a client cannot get them
wrong.
"""

from rushhour.bundle.folder import Bundle, check_folder, check_place, is_bundle, name_of, suggest_bundle
from rushhour.bundle.manifest import (
    ANSWERS,
    MODEL,
    SAMPLES,
    WEIGHTS,
    Decoding,
    DType,
    FileRecord,
    Manifest,
    Preprocessing,
    Reshape,
    Signature,
    Source,
    Step,
    TensorSpec,
)

__all__ = [
    "ANSWERS",
    "MODEL",
    "SAMPLES",
    "WEIGHTS",
    "Bundle",
    "DType",
    "Decoding",
    "FileRecord",
    "Manifest",
    "Preprocessing",
    "Reshape",
    "Signature",
    "Source",
    "Step",
    "TensorSpec",
    "check_folder",
    "check_place",
    "is_bundle",
    "name_of",
    "suggest_bundle",
]
