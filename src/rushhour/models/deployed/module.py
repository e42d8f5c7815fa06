"""A network as it is served, in torch: the wire's samples in, the task's answers out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rushhour.bundle import Preprocessing, columns_of, described
from rushhour.errors import ModelError, RushhourError
from rushhour.models.deployed.heads import Boxes, ClassMap, Tags
from rushhour.models.deployed.outputs import Meaning, as_logits, main_output
from rushhour.models.failure import why_failed
from rushhour.task import Head, Scaling, Task, are_probabilities

Inputs = tuple[Tensor, ...]
"""A batch: a tensor `(n, *shape)` for each input, in the network's order."""

_RESHAPING = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias", "Transpose", "Slice")
"""Prefixes of the names of autograd nodes that change no number."""


class Preprocess(nn.Module):
    """A `Preprocessing` in torch: any dtype in the wire's layout to float32 in the network's layout.

    Attributes:
        contiguous: whether pictures are copied into torch's standard memory format, which networks that call `view`
            need; else they stay channels-last.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.pictures = preprocessing.layout == "NHWC->NCHW"
        self.contiguous = True
        std = np.asarray(preprocessing.std or (1.0,), dtype=np.float64)
        mean = np.asarray(preprocessing.mean or (0.0,), dtype=np.float64)
        if not (np.isfinite(std) & (std != 0)).all():
            raise ModelError(
                f"cannot scale samples by the standard deviations {preprocessing.std}",
                "a channel that never changes cannot be scaled",
                "use std=1 for it, or leave that channel out",
            )
        trailing = (-1, 1, 1) if self.pictures else (-1,)
        factor, offset = preprocessing.scale / std, -mean / std
        self.plain = bool((factor == 1).all() and (offset == 0).all())
        self.register_buffer("factor", torch.from_numpy(factor).float().reshape(trailing), persistent=False)
        self.register_buffer("offset", torch.from_numpy(offset).float().reshape(trailing), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """`(n, h, w, c)` to `(n, c, h, w)` for pictures (channels-last in memory by default), else the same shape."""
        if self.pictures:
            samples = samples.permute(0, 3, 1, 2)
            if self.contiguous:  # `contiguous()` does not change the strides of a single channel
                samples = samples.clone(memory_format=torch.contiguous_format)
        samples = samples.to(torch.float32)
        return samples if self.plain else samples * self.factor + self.offset


class Deployed(nn.Module):
    """Preprocessing, network and the task's head: what a bundle's ONNX graph computes, in torch.

    In training mode, modules that the network's factory left in evaluation mode stay in it.

    Args:
        network: gives logits (classification), values (regression) or an embedding, `(n, outputs)`, or of each place
            of a picture or sequence what `Spatial.raw_shape` says; as its factory left it. Where it gives several
            outputs, `main_output` says which one counts.
        task: decides the head: softmax, sigmoid, class map, boxes, tags, or none.
        preprocessing: applied to the samples first; a network of several inputs gets them as the wire carries them.

    Attributes:
        meaning: of the network's outputs; logits until `settle` finds it.
        outputs: length of one answer; None where answers are about places in a picture.
        scaling: of the network's numbers, which become values.
        temperature: that logits are divided by before the head; None where they are not. `logits` gives them as the
            network does: a loss is of these.

    Raises:
        ModelError: if the preprocessing cannot be computed.
    """

    def __init__(self, network: nn.Module, task: Task, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocessing)
        self.network = network
        heads: dict[Head, Callable[[], nn.Module]] = {
            "softmax": lambda: nn.Softmax(dim=-1),
            "sigmoid": nn.Sigmoid,
            "none": nn.Identity,
            "class map": ClassMap,
            "boxes": lambda: Boxes(task.outputs),
            "tags": Tags,
        }
        self.head = heads[task.head]()
        self.meaning: Meaning = "logits"
        self.outputs = None if task.spatial is not None else task.outputs
        self.scaling = task.scaling if isinstance(task.scaling, Scaling) else None
        self.temperature = task.temperature if isinstance(task.temperature, float) else None
        self._in_evaluation = [module for module in network.modules() if not module.training]

    def train(self, mode: bool = True) -> Deployed:
        """As of any module, but modules that the factory left in evaluation mode stay in it."""
        super().train(mode)
        for module in self._in_evaluation:
            module.training = False
        return self

    def logits(self, *samples: Tensor) -> Tensor:
        """Logits or values for the loss, `(n, outputs)`, or of each place; see `as_logits`."""
        return self.as_logits(self._raw(*samples))

    def as_logits(self, raw: Any) -> Tensor:
        """The network's raw output as logits or values; see `as_logits`."""
        return as_logits(raw, self.outputs, self.meaning, self.scaling)

    def forward(self, *samples: Tensor) -> Tensor:
        """Answers `(n, outputs)` to samples `(n, *shape)` as the wire carries them, a tensor for each input."""
        raw = self._raw(*samples)
        ready = self.meaning == "probabilities" or (self.meaning == "chances" and isinstance(self.head, nn.Sigmoid))
        if ready and self.temperature is None:
            return main_output(raw, self.outputs)
        logits = self.as_logits(raw)
        out: Tensor = self.head(logits if self.temperature is None else logits / self.temperature)
        return out

    def settle(self, samples: NDArray[Any], model: str) -> None:
        """Run the network once, in evaluation mode: lazy layers get their sizes, and `meaning` is found.

        Args:
            samples: one or more, as in `export`.
            model: its name, for the message.

        Raises:
            ModelError: if the network cannot take samples of this shape, or gives no tensor of answers.
        """
        self.meaning = "logits"
        self.answer_shape(samples, model)
        if not isinstance(self.head, nn.Softmax | nn.Sigmoid):
            return
        columns = tensors_of(samples[:2])
        with torch.no_grad():
            out = self.logits(*columns)
        if isinstance(self.head, nn.Softmax) and are_probabilities(out.float().numpy()):
            self.meaning = "probabilities"
        elif bool(((out >= 0) & (out <= 1)).all()) and self._ends_in_sigmoid(columns):
            self.meaning = "chances"

    def _ends_in_sigmoid(self, columns: Inputs) -> bool:
        """Whether the last operation of the network is a sigmoid."""
        with torch.enable_grad():
            inputs = [
                column.requires_grad_() if column.is_floating_point() else column for column in self.prepared(*columns)
            ]
            node: Any = main_output(self.network(*inputs), self.outputs).grad_fn
        while node is not None and node.name().startswith(_RESHAPING) and node.next_functions:
            node = node.next_functions[0][0]
        return node is not None and node.name().startswith("SigmoidBackward")

    def answer_shape(self, sample: NDArray[Any], model: str) -> tuple[int, ...]:
        """The shape of the answer to one sample, found by a forward pass; leaves the module in evaluation mode.

        Args:
            sample: one or more samples, as in `export`.
            model: its name, for the message.

        Raises:
            ModelError: if the network cannot take samples of this shape.
        """
        try:
            self.eval()
            with torch.no_grad():
                out = self(*tensors_of(sample[:2]))
        except RushhourError:
            raise
        except Exception as error:  # a user's network may fail in any way
            raise ModelError(
                f"the model {model} cannot take samples of {described(sample)}",
                why_failed(error),
                _remedy(error, sample),
            ) from error
        return tuple(out.shape[1:])

    def prepared(self, *samples: Tensor) -> Inputs:
        """What the network is given: a single input preprocessed, several as they are."""
        return samples if len(samples) > 1 else (self.preprocess(samples[0]),)

    def _raw(self, *samples: Tensor) -> Any:
        return self.network(*self.prepared(*samples))


def _remedy(error: Exception, sample: NDArray[Any]) -> str:
    text = str(error)
    if names := sample.dtype.names:
        return f"let its forward take a tensor for each input, as they are: {', '.join(names)}"
    if "indices" in text and "scalar types: Long" in text:
        return "samples arrive as float32: use .long() on them in its forward"
    if "missing" in text and "required positional argument" in text:
        return "let its forward take one tensor, or give data with an array for each input, by its name"
    if sample.ndim == 3 and any(size in text for size in ("channels", "conv", "Conv", "expected 4D", "3D or 4D")):
        return (
            "pictures have a dimension of channels: give arrays (n, height, width, channels), for example x[..., None]"
        )
    return "give the model arguments that fit the data, or data that fits the model"


def tensors_of(samples: NDArray[Any]) -> Inputs:
    """A tensor for each input, copied: a network may write to it, and the data may be mapped from a file."""
    return tuple(torch.from_numpy(np.array(column, order="C")) for column in columns_of(samples))
