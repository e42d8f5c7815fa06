"""The way of a network to a bundle: exported, verified and sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from rushhour.bundle import (
    Bundle,
    Manifest,
    OpenDimension,
    Preprocessing,
    Signature,
    Source,
    Step,
    TensorSpec,
    Text,
    columns_of,
)
from rushhour.errors import ModelError
from rushhour.models.deployed.graph import graph_of, verify
from rushhour.models.deployed.module import Deployed
from rushhour.models.trust import record_factory
from rushhour.task import Task

_LARGEST_BYTES = 1_900_000_000
"""Of the weights in one ONNX file: protobuf is limited to 2 GiB, and the graph and tools need some of it."""


def export(
    network: nn.Module,
    *,
    name: str,
    task: Task,
    sample_spec: TensorSpec | tuple[TensorSpec, ...],
    preprocessing: Preprocessing,
    source: Source | None,
    lineage: tuple[Step, ...],
    samples: NDArray[Any],
    path: Path,
    dimensions: tuple[OpenDimension, ...] = (),
    text: tuple[Text, bytes] | None = None,
) -> Bundle:
    """Write `network` as a bundle whose ONNX graph answers as the torch module does, at any batch size.

    Equal weights give an equal bundle: the graph holds nothing of this machine. The network is left in evaluation mode
    and in torch's standard memory format.

    Args:
        network: gives logits or values, `(n, outputs)`.
        name: of the bundle.
        sample_spec: the input: `image` for pictures, `input` otherwise; of several inputs each, in the network's order.
        source: how to build the network again; None if it cannot be.
        lineage: the steps that made it.
        samples: a few real inputs, `(k, *shape)` with k of 1 or more; of several inputs a structured array of shape
            `(k,)`, with a field for each in the same order.
        path: the bundle's folder; an older one is replaced.
        dimensions: of the inputs, that are open besides the batch; samples are padded to one size in them.
        text: how texts become samples, and the content of `tokenizer.json`.

    Raises:
        TaskError: if the network's output does not fit the task; nothing is written then.
        ModelError: if it cannot be exported, or ONNX Runtime's answers differ from torch's.
        StorageError: if the disk does not take it.
    """
    specs = sample_spec if isinstance(sample_spec, tuple) else (sample_spec,)
    columns = columns_of(samples)
    names = [spec.name for spec in specs]
    signature = Signature(
        inputs=specs,
        outputs=(answer_spec(task, specs[0].shape),),
        open=dimensions or msgspec.UNSET,
    )
    sizes = signature.sizes_of(dict(zip(names, columns, strict=False)))
    wanted = [(signature.shape(spec, sizes), np.dtype(spec.dtype)) for spec in specs]
    if [(column.shape[1:], column.dtype) for column in columns] != wanted or len(samples) == 0:
        raise ModelError(
            f"cannot export {name} with samples of {samples.dtype}{samples.shape}",
            f"the signature says one or more of {', '.join(f'{spec.dtype}{spec.shape}' for spec in specs)}",
            "give samples as the wire carries them",
        )
    weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if weights_bytes > _LARGEST_BYTES:
        raise ModelError(
            f"cannot export {name}",
            f"its weights take {weights_bytes / 1e9:.1f} GB, and one ONNX file holds {_LARGEST_BYTES / 1e9:.1f} GB",
            "use a smaller model",
        )
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    deployed = Deployed(network, task, preprocessing)
    deployed.settle(samples, name)
    task.check_output(deployed.answer_shape(samples, name), name, specs[0].shape)
    graph = graph_of(deployed, name, samples, names, task.output_name, dimensions)
    manifest = Manifest(
        name=name,
        signature=signature,
        task=task,
        preprocessing=preprocessing,
        source=source,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        lineage=lineage,
        text=msgspec.UNSET if text is None else text[0],
    )

    def model(file: Path) -> None:
        onnx.save(graph, file)
        verify(file, deployed, name, names, samples)

    def weights(file: Path) -> None:
        from safetensors.torch import save

        # clones: safetensors refuses tensors that share memory (tied weights) or are not contiguous
        state = {
            key: value.detach().clone(memory_format=torch.contiguous_format)
            for key, value in network.state_dict().items()
        }
        file.write_bytes(save(state))

    inputs = dict(zip(names, columns, strict=True))
    bundle = Bundle.create(path, manifest, model, weights, inputs, None if text is None else text[1])
    record_factory(bundle)
    return bundle


def answer_spec(task: Task, sample: tuple[int, ...]) -> TensorSpec:
    """The answer to one sample, whose shape on the wire is `sample`."""
    spatial = task.spatial
    if spatial is None:
        return TensorSpec(task.output_name, "float32", (task.outputs,))
    return TensorSpec(task.output_name, spatial.dtype, spatial.answer_shape(sample), places=spatial.places)


def try_export(
    deployed: Deployed, name: str, sample: tuple[TensorSpec, ...], samples: NDArray[Any], task: Task
) -> None:
    """Raise unless the network can be exported; nothing is kept.

    Args:
        deployed: as `export` makes it.
        name: of the network, for the message.
        sample: one sample on the wire: each input.
        samples: a few.
        task: names the output.

    Raises:
        ModelError: if it cannot be exported, or the graph answers differently.
    """
    deployed.settle(samples, name)
    names = [spec.name for spec in sample]
    graph = graph_of(deployed, name, samples, names, task.output_name)
    verify(graph.SerializeToString(), deployed, name, names, samples)
