"""The memory format of pictures in training: channels-last where that is safe and faster.

oneDNN writes past a buffer in one case (oneDNN#6035; torch 2.13.0 has oneDNN 3.12). The gradient of the weights of a
1x1 convolution with a stride needs its input without the pixels that the stride skips. `jit_1x1` copies them into a
buffer of `pixels x channels`, and addresses a pixel at `pixel x block`, the block being 8 channels on AVX2 and 16 on
AVX-512. With fewer channels than a block it writes past the end. This happens with channels-last inputs or weights
only, so such a network is trained with contiguous ones, and without oneDNN if it makes channels-last inputs itself.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rushhour.models import Deployed, Inputs, tensors_of
from rushhour.system.faults import user_code_line

_BLOCK = 16
"""Channels from which on all instruction sets are safe; AVX2's block is 8, but a training may change machines."""
_STRIDED_RANKS = (3, 4)
"""Dimensions of the weights of convolutions that `jit_1x1` computes so: of signals and pictures, not of volumes."""
_LEAST_STEPS = 200
"""Steps of the shortest training with trial steps: 8 of them are then 4% of its time."""
_WARM, _TIMED = 1, 3
_CLEARLY = 1.1
"""By which contiguous must be faster to be chosen: smaller differences are noise, and a choice should repeat."""
_LARGEST_BYTES = 500_000_000
"""Of a network that is copied for trial steps."""

NOTE = "memory_format"
"""Its name in a checkpoint's notes: a training that is resumed in another format would round differently."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


class MemoryFormat(msgspec.Struct, frozen=True):
    """The memory format chosen for one network.

    Attributes:
        channels_last: whether weights and pictures are channels-last; else contiguous.
        onednn: whether torch may use oneDNN.
        why: in words; empty where there was no choice.
    """

    channels_last: bool
    onednn: bool = True
    why: str = ""

    def __str__(self) -> str:
        form = "channels-last" if self.channels_last else "contiguous" if self.onednn else "without oneDNN"
        return f"{form}: {self.why}" if self.why else form

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, torch uses oneDNN or not, on all threads of this process. `apply` changes the network."""
        # not `torch.backends.mkldnn.flags`, which also sets, and warns of, the precision of TF32
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(before and self.onednn)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)

    def apply(self, deployed: Deployed) -> None:
        """Convert the network, in place, and its inputs from now on."""
        for tensor in (*deployed.network.parameters(), *deployed.network.buffers()):
            if self.channels_last:
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
            elif tensor.dim() in _STRIDED_RANKS and not _is_plain(tensor):
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        deployed.preprocess.contiguous = not self.channels_last


def choose(
    deployed: Deployed,
    samples: NDArray[Any],
    *,
    bf16: bool,
    steps: int,
    allowed: bool = True,
    kept: Mapping[str, Any] | None = None,
) -> MemoryFormat:
    """The format to train a network in.

    Two samples pass through it in evaluation mode; where there may be a gain, trial steps follow on copies. Neither
    changes the network or torch's generator.

    Args:
        deployed: with the network.
        samples: a batch as it passes through the network, `(n, *shape)`, as on the wire.
        bf16: whether it computes in bfloat16.
        steps: of the training.
        allowed: whether channels-last may be chosen.
        kept: the choice of an interrupted part of the same training, as builtins: it is repeated where it is safe.
    """
    pictures = deployed.preprocess.pictures
    guarded = guard(deployed, samples)
    if guarded is not None:
        return guarded
    if not pictures:
        return MemoryFormat(channels_last=False)
    if not allowed:
        return MemoryFormat(channels_last=False, why="asked for")
    if kept is not None:
        return msgspec.convert(kept, MemoryFormat)
    if (failed := _fails_channels_last(deployed, samples, bf16=bf16)) is not None:
        return MemoryFormat(channels_last=False, why=failed)
    if not any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in deployed.modules()):
        return MemoryFormat(channels_last=True)
    if steps < _LEAST_STEPS or _bytes(deployed) > _LARGEST_BYTES:
        return MemoryFormat(channels_last=True)
    gain = _gain(deployed, samples, bf16=bf16)
    if gain is None:
        return MemoryFormat(channels_last=True)
    if gain * _CLEARLY < 1:
        return MemoryFormat(channels_last=False, why=f"{1 / gain:.1f}x faster in trial steps")
    return MemoryFormat(channels_last=True, why=f"{gain:.1f}x as fast as contiguous in trial steps")


def _fails_channels_last(deployed: Deployed, samples: NDArray[Any], *, bf16: bool) -> str | None:
    """Why the network cannot take channels-last pictures, found by a step on a copy; None where it can.

    A network that calls `view` on the output of a convolution needs the standard format, as in plain torch.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            own = copy.deepcopy(deployed).train()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return "it cannot be copied to try channels-last"  # weights that are computed (weight_norm), caches of them
    MemoryFormat(channels_last=True).apply(own)
    step = _stepping(own, tensors_of(samples[:3]), bf16=bf16)
    try:
        with torch.random.fork_rng(devices=[]):
            step()
    except Exception as error:  # a user's network may fail in any way
        return f"its own code takes nothing else{user_code_line(error)}"
    return None


def guard(deployed: Deployed, samples: NDArray[Any]) -> MemoryFormat | None:
    """The format that must be chosen because channels-last would corrupt memory; None where both formats are safe.

    It checks every convolution that the network has as a layer, or calls for two samples in evaluation mode.

    Args:
        deployed: with the network, in any memory format, which stays.
        samples: two or more, as on the wire.
    """
    names = {module.weight.data_ptr(): name for name, module in deployed.network.named_modules() if _at_fault(module)}
    called = _called(deployed, samples)
    faulty = [call for call in called if call.at_fault]
    if not names and not faulty:
        return None
    layers = dict(deployed.network.named_modules())
    named = [f"{type(layers[name]).__name__} {name!r}" for name in names.values()]
    what = named[0] if named else "a convolution that the network calls"
    sizes = faulty[0].described if faulty else "1x1 with a stride"
    why = f"{what} is {sizes}: channels-last, oneDNN would write past a buffer (oneDNN#6035)"
    # a layer that was not called for these samples may get any input
    unknown = set(names) - {call.weight for call in called}
    if unknown or any(not call.plain for call in faulty):
        return MemoryFormat(channels_last=False, onednn=False, why=f"{why}, and the network reorders its inputs itself")
    return MemoryFormat(channels_last=False, why=why)


class _Call(msgspec.Struct, frozen=True):
    """One call of a convolution.

    Attributes:
        weight: address of the weights.
        plain: whether input and weights are contiguous, by their strides.
    """

    weight: int
    plain: bool
    at_fault: bool
    described: str


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every convolution, of layers and of functions."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default):
            inputs, weight, _, stride, _, _, _, _, groups = args[:9]
            self._calls.append(
                _Call(
                    weight.data_ptr(),
                    _is_plain(inputs) and _is_plain(weight),
                    _is_faulty(weight, stride, groups),
                    f"{'x'.join(map(str, weight.shape[2:]))}, stride {max(stride)}, {weight.shape[1]} channels",
                )
            )
        return func(*args, **(kwargs or {}))


def _called(deployed: Deployed, samples: NDArray[Any]) -> list[_Call]:
    """The convolutions that two contiguous samples pass through."""
    calls: list[_Call] = []
    preprocess, modes = deployed.preprocess, {module: module.training for module in deployed.modules()}
    before, preprocess.contiguous = preprocess.contiguous, True
    deployed.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Recorder(calls):
            deployed.logits(*tensors_of(samples[:2]))
    finally:
        preprocess.contiguous = before
        for module, mode in modes.items():
            module.training = mode
    return calls


def _at_fault(module: nn.Module) -> bool:
    return isinstance(module, _LAYERS) and _is_faulty(module.weight, module.stride, module.groups)


def _is_faulty(weight: Tensor, stride: tuple[int, ...], groups: int) -> bool:
    """Whether the gradient of these weights may write past its buffer, channels-last.

    The second dimension of the weights is the side with more pixels, of a transposed convolution too.
    """
    return (
        weight.dim() in _STRIDED_RANKS
        and all(size == 1 for size in weight.shape[2:])
        and max(stride) > 1
        and groups == 1
        and weight.shape[1] < _BLOCK
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether the strides are those of torch's standard format.

    `is_contiguous` says so of 1x1 weights and of one channel, channels-last too, and torch computes channels-last then.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(1, size)
    return True


def _bytes(deployed: Deployed) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in deployed.parameters())


def _gain(deployed: Deployed, samples: NDArray[Any], *, bf16: bool) -> float | None:
    """How many times faster steps are channels-last than contiguous; None if they cannot be taken on copies."""
    inputs = tensors_of(samples)
    taken: dict[bool, list[float]] = {True: [], False: []}
    try:
        with torch.random.fork_rng(devices=[]):
            steps: dict[bool, Callable[[], None]] = {}
            for channels_last in taken:
                own = copy.deepcopy(deployed).train()
                MemoryFormat(channels_last).apply(own)
                steps[channels_last] = _stepping(own, inputs, bf16=bf16)
            for turn in range(_WARM + _TIMED):
                for channels_last, step in steps.items():
                    began = time.perf_counter()
                    step()
                    if turn >= _WARM:
                        taken[channels_last].append(time.perf_counter() - began)
    except (RuntimeError, TypeError, ValueError):  # the training reports the error better
        return None
    return min(taken[False]) / min(taken[True])


def _stepping(deployed: Deployed, inputs: Inputs, *, bf16: bool) -> Callable[[], None]:
    """Forward and backward, with any loss."""

    def step() -> None:
        deployed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = deployed.logits(*inputs)
        outputs.float().square().mean().backward()  # type: ignore[no-untyped-call]

    return step
