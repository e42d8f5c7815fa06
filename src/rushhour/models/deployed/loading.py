"""The way of a bundle back to torch: its network with its weights, checked against the recorded answers."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import torch
from torch import nn

from rushhour.bundle import Bundle, Source
from rushhour.errors import ModelError
from rushhour.models.deployed.module import Deployed, tensors_of
from rushhour.models.source import build
from rushhour.models.trust import trusted_factories
from rushhour.records.answers import TOLERANCES, deviation
from rushhour.system.storage import explained
from rushhour.task import ensure_kind


def load_deployed(bundle: Bundle, trusted: tuple[str, ...] = ()) -> Deployed:
    """The torch module of a bundle, with its weights, in evaluation mode.

    Args:
        bundle: must carry a source and weights.
        trusted: factories that may be imported besides those of this package; see `build`.

    Raises:
        ModelError: if the bundle carries no torch module, or it cannot be built, or the weights do not fit it.
        StorageError: if the weights cannot be read.
    """
    source = bundle.manifest.source
    if source is None or bundle.weights is None:
        raise ModelError(
            f"the bundle {bundle.manifest.name} has no torch module",
            "it carries only its ONNX graph" if bundle.manifest.precision != "int8" else "it is quantised",
            "run it on openvino or onnxruntime",
        )
    with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced; the caller's generator must not advance
        known = trusted_factories(bundle, trusted)
        network = build(source, known)
    ensure_kind(bundle.manifest.task.kind, known)
    load_weights(network, bundle)
    deployed = Deployed(network, bundle.manifest.task, bundle.manifest.preprocessing)
    samples, name = bundle.sample_rows()[:2], bundle.manifest.name
    with suppress(ModelError) if bundle.answers() is not None else nullcontext():  # then `_check_answers` raises
        deployed.settle(samples, name)
    if deployed.preprocess.pictures:  # channels-last is faster, where the network can take it
        deployed.preprocess.contiguous = False
        try:
            deployed.answer_shape(samples, name)
        except ModelError:
            deployed.preprocess.contiguous = True
    deployed.eval()
    _check_answers(deployed, bundle, source)
    return deployed


def load_weights(network: nn.Module, bundle: Bundle) -> None:
    """Put the weights of a bundle into its network.

    Raises:
        ModelError: if they do not fit it.
        StorageError: if they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source, file = bundle.manifest.source, bundle.weights
    assert source is not None
    assert file is not None
    try:
        with explained(f"read {file}"):
            state = load_file(file)
        network.load_state_dict(state, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights of {bundle.manifest.name} do not fit its model {source.factory}",
            str(error),
            "make the bundle again with the installed code",
        ) from error


def _check_answers(deployed: Deployed, bundle: Bundle, source: Source) -> None:
    """Raise unless the module gives the answers that the bundle recorded: its code may have changed."""
    recorded, manifest = bundle.answers(), bundle.manifest
    if recorded is None:
        return
    count = len(next(iter(recorded.values())))
    samples = bundle.sample_rows()[:count]
    try:
        with torch.no_grad():
            answers = deployed(*tensors_of(samples))
        found = answers.numpy() if not answers.is_floating_point() else answers.float().numpy()
        off = deviation(recorded, {manifest.signature.outputs[0].name: found}, manifest.signature.boxes)
        why = f"its answers differ by {off:.1%} of their range" if not off <= TOLERANCES["f32"] else ""
    except Exception as error:  # changed code may fail in any way
        why = f"it fails with {type(error).__name__}"
    if why:
        raise ModelError(
            f"{source.factory} is not the network of {manifest.name}",
            f"with the bundle's weights {why}: its code has changed since",
            "restore the code, or train again",
        )
