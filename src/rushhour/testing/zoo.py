"""Random small networks, each trained for three steps in a process of its own, with a checked heap.

Memory corruption by a native library ends in a signal or a hang of its process, if it shows at all. So a child process
is started in which glibc checks every block that is freed, and it forks for each network.
"""

from __future__ import annotations

import ctypes.util
import gc
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Preprocessing
from rushhour.models import Deployed
from rushhour.task import Task
from rushhour.train.memory_format import MemoryFormat, choose

Way = Literal["rushhour", "channels-last", "contiguous", "as it comes"]
"""The memory format of weights and pictures: chosen by Rushhour; both channels-last; both contiguous; contiguous
weights, and pictures as a view of those in the request, which are channels-last."""
Instructions = Literal["native", "avx2"]
"""The instruction sets that torch and oneDNN may use."""

WAYS: tuple[Way, ...] = ("rushhour", "channels-last", "contiguous", "as it comes")
STEPS = 3
CLASSES = 4
_LARGEST = 32
"""Channels, pixels of a side, samples of a batch."""
_MOST_CPU_S, _MOST_S = 5.0, 60.0
"""Limits of processor time and wall time of one network, which takes a tenth of a second: beyond them it hangs."""
_POLL_S = 0.25
_RESTRICTED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_RAISED = 3
"""Exit code of a fork in which torch raised an error."""


class Layer(msgspec.Struct, frozen=True):
    """A convolution, and what follows it.

    Attributes:
        transposed: a transposed convolution, which enlarges pictures where it has a stride.
        reordered: its input is copied to channels-last.
        norm: batch normalisation follows.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    bias: bool
    padding: int
    transposed: bool = False
    reordered: bool = False
    norm: bool = False


class Specimen(msgspec.Struct, frozen=True):
    """One network and how it is trained.

    Attributes:
        signals: one-dimensional convolutions, of samples `(channels, side)`; else two-dimensional ones, of pictures
            `(side, side, channels)`.
        bf16: computed in bfloat16, where oneDNN has it.
        threads: that compute it.
    """

    layers: tuple[Layer, ...]
    signals: bool
    side: int
    batch: int
    bf16: bool
    threads: int


KNOWN_BAD = Specimen((Layer(4, 8, 1, 2, 1, False, 0),), signals=False, side=16, batch=30, bf16=False, threads=1)
"""Corrupts the heap channels-last on a machine with AVX2 and no more."""


class Outcome(msgspec.Struct, frozen=True):
    """The end of a training.

    Attributes:
        ended: `well`, `hung`, the name of a signal, or the message of an error.
        corrupted: by a signal or a hang.
    """

    number: int
    way: Way
    ended: str

    @property
    def corrupted(self) -> bool:
        """Whether memory was corrupted: it ended by a signal, or hung."""
        return self.ended == "hung" or self.ended.startswith("SIG")


def specimen(seed: int) -> Specimen:
    """A network from 1 to 4 layers: channels and batch of 1 to 32, kernels of 1 to 7, strides of 1 to 3."""
    draw = random.Random(seed)
    signals = draw.random() < 0.15
    side = draw.randint(8, _LARGEST)
    channels, size, layers = draw.choice([1, 3, draw.randint(1, _LARGEST)]), side, []
    for _ in range(draw.randint(1, 4)):
        groups = draw.choice([one for one in (1, 1, 1, 2, 4, channels) if channels % one == 0])
        outputs = groups * draw.randint(1, _LARGEST // groups)
        kernel, stride = draw.choice([1, 1, 3, draw.randint(1, 7)]), draw.choice([1, 2, 2, 3])
        padding, transposed = draw.choice([0, kernel // 2]), draw.random() < 0.15
        if transposed:
            padding = 0
            after = size * stride + max(0, kernel - stride)
        else:
            after = (size + 2 * padding - kernel) // stride + 1
        if not 1 <= after <= 2 * _LARGEST:
            break
        layers.append(
            Layer(
                channels,
                outputs,
                kernel,
                stride,
                groups,
                bias=draw.random() < 0.5,
                padding=padding,
                transposed=transposed,
                reordered=draw.random() < 0.1,
                norm=draw.random() < 0.5,
            )
        )
        channels, size = outputs, after
    if not layers:
        layers = [Layer(channels, 8, 1, 2, 1, bias=True, padding=0)]
    return Specimen(
        tuple(layers),
        signals,
        side,
        draw.randint(1, _LARGEST),
        bf16=draw.random() < 0.25,
        threads=draw.choice([1, 1, 2]),
    )


def trained(one: Specimen, way: Way) -> None:
    """Train it for three steps in this process, which may crash."""
    torch.set_num_threads(one.threads)
    torch.manual_seed(0)
    bf16 = one.bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # Rushhour uses bfloat16 only with it
    deployed = Deployed(
        nn.Sequential(*_modules(one)),
        Task.classification(tuple("abcd")),
        Preprocessing(scale=1 / 255, layout="none" if one.signals else "NHWC->NCHW"),
    )
    first, numbers = one.layers[0].inputs, np.random.default_rng(0)
    shape = (first, one.side) if one.signals else (one.side, one.side, first)
    samples = numbers.integers(0, 256, (max(2, one.batch), *shape), dtype=np.uint8)
    targets = torch.from_numpy(numbers.integers(0, CLASSES, one.batch))
    if way == "rushhour":
        form = choose(deployed, samples, bf16=bf16, steps=STEPS)
    else:
        form = MemoryFormat(channels_last=way == "channels-last")
    form.apply(deployed)
    deployed.preprocess.contiguous &= way != "as it comes"
    optimizer = torch.optim.SGD(deployed.parameters(), lr=0.01)
    with form.active():
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = deployed.logits(torch.from_numpy(samples[: one.batch]))
            optimizer.zero_grad()
            functional.cross_entropy(outputs.float(), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    del deployed, optimizer, outputs
    gc.collect()  # the heap is checked when blocks are freed


def outcomes(
    numbers: Sequence[int], ways: Sequence[Way], instructions: Instructions, known: bool = False
) -> Iterator[Outcome]:
    """Train each specimen in each way, in forks of a child process, and yield how each ended.

    Args:
        numbers: seeds of the specimens.
        ways: memory formats of each.
        instructions: that the child may use.
        known: number 0 is `KNOWN_BAD` instead.

    Raises:
        RuntimeError: if the child process itself fails.
    """
    arguments = msgspec.json.encode((list(numbers), ways, known)).decode()
    command = [sys.executable, "-m", "rushhour.testing.zoo", arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(instructions)) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield msgspec.json.decode(line, type=Outcome)
        finally:
            if child.poll() is None:
                child.terminate()
        if child.wait() not in (0, -signal.SIGTERM):
            raise RuntimeError(f"the zoo's child process ended with {child.returncode}")


def environment(instructions: Instructions) -> dict[str, str]:
    """Environment variables of a process with a checked heap that may use these instructions only."""
    checked = {
        "MALLOC_CHECK_": "3",  # abort when a block is freed that was written past
        "MALLOC_PERTURB_": "165",  # freed memory holds no old values
        "MALLOC_MMAP_THRESHOLD_": "33554432",  # large blocks are on the heap too
        "OMP_WAIT_POLICY": "passive",  # other processes need the cores too
    }
    library = checker()
    preloaded = {} if library is None else {"LD_PRELOAD": library}
    return {**os.environ, **checked, **preloaded, **(_RESTRICTED if instructions == "avx2" else {})}


def checker() -> str | None:
    """glibc's library that checks the heap; None where there is none, and corruption is found by chance only."""
    return ctypes.util.find_library("c_malloc_debug")


def _modules(one: Specimen) -> Iterator[nn.Module]:
    channels = 0
    for layer in one.layers:
        if layer.reordered:
            yield _Reordered()
        sizes = (layer.inputs, layer.outputs, layer.kernel)
        if layer.transposed:
            up: type[nn.Module] = nn.ConvTranspose1d if one.signals else nn.ConvTranspose2d
            more = max(0, layer.stride - layer.kernel)
            yield up(*sizes, stride=layer.stride, groups=layer.groups, bias=layer.bias, output_padding=more)
        else:
            kind: type[nn.Module] = nn.Conv1d if one.signals else nn.Conv2d
            yield kind(*sizes, stride=layer.stride, groups=layer.groups, bias=layer.bias, padding=layer.padding)
        if layer.norm and one.batch > 1:
            yield nn.BatchNorm1d(layer.outputs) if one.signals else nn.BatchNorm2d(layer.outputs)
        yield nn.ReLU(inplace=True)
        channels = layer.outputs
    yield nn.AdaptiveAvgPool1d(1) if one.signals else nn.AdaptiveAvgPool2d(1)
    yield nn.Flatten()
    yield nn.Linear(channels, CLASSES)


class _Reordered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x.transpose(1, 2).contiguous().transpose(1, 2)


def _serve(numbers: Sequence[int], ways: Sequence[Way], known: bool) -> None:
    # on one thread, because a fork has no others; modules that are imported now are not imported in each fork
    trained(
        Specimen((Layer(1, 1, 3, 1, 1, False, 0),), signals=False, side=4, batch=1, bf16=False, threads=1), "rushhour"
    )
    gc.freeze()
    for number in numbers:
        one = KNOWN_BAD if known and number == 0 else specimen(number)
        for way in ways:
            line = msgspec.json.encode(Outcome(number, way, _ended(one, way)))
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()


def _ended(one: Specimen, way: Way) -> str:
    """How a training ended, in a fork."""
    receiver, sender = os.pipe()
    process = os.fork()
    if not process:
        os.close(receiver)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of glibc
        try:
            trained(one, way)
        except Exception as error:
            os.write(sender, f"{type(error).__name__}: {error}".encode()[:500])
            os._exit(_RAISED)
        os._exit(0)
    os.close(sender)
    until, hung = time.monotonic() + _MOST_S, False
    while not hung and not select.select([receiver], [], [], _POLL_S)[0]:  # closed when the fork ends
        hung = _cpu_s(process) > _MOST_CPU_S or time.monotonic() > until
    if hung:
        os.kill(process, signal.SIGKILL)
    message = b"" if hung else os.read(receiver, 500)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(receiver)
    if hung:
        return "hung"
    if code < 0:
        return signal.Signals(-code).name
    return message.decode(errors="replace") or ("well" if code == 0 else f"exit {code}")


def _cpu_s(process: int) -> float:
    """CPU seconds of all its threads: a process that waits for a core does not hang."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    _serve(*msgspec.json.decode(sys.argv[1], type=tuple[list[int], list[Way], bool]))
