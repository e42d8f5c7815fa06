"""Small named networks of all kinds, as users bring them: each a factory, with the data that it takes.

A factory is named as `rushhour.testing.gallery:residual`. Most train; some cannot be trained or served, and a word of
the line that must say so stands beside them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Preprocessing, Source
from rushhour.data.dataset import Dataset, Split
from rushhour.task import Task

CLASSES = 4
Data = Literal["pictures", "series", "signals", "volumes", "rows", "values", "pairs"]
"""uint8 `(12, 12, 3)`; float32 `(6, 8)`, `(3, 16)`, `(1, 4, 6, 6)` and `(10,)`, all in 4 classes; the last with a value
to regress; and two inputs."""


class Specimen(msgspec.Struct, frozen=True):
    """One network.

    Attributes:
        name: of the factory.
        data: that it takes.
        refused: a word of the line by which training refuses it; empty where it trains.
        random: it draws random numbers in training, which are others on several workers.
    """

    name: str
    data: Data = "pictures"
    refused: str = ""
    random: bool = False

    @property
    def source(self) -> Source:
        """How it is built."""
        return Source(f"{__name__}:{self.name}")


def data(kind: Data, n: int = 96) -> Dataset:
    """Noise with a trace of the class in it, three quarters of it to train on."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    shapes: dict[Data, tuple[int, ...]] = {
        "series": (6, 8), "signals": (3, 16), "volumes": (1, 4, 6, 6), "rows": (10,), "values": (10,), "pairs": (6,),
    }  # fmt: skip
    inputs: NDArray[Any]
    targets: NDArray[Any] = labels
    task, preprocessing = Task.classification(tuple("abcd")), Preprocessing()
    if kind == "pictures":
        inputs = random.integers(0, 128, (n, 12, 12, 3), dtype=np.uint8)
        for picture, label in zip(inputs, labels, strict=True):
            picture[label * 3 : label * 3 + 3, :, label % 3] += 100
        preprocessing = Preprocessing(1 / 255, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), "NHWC->NCHW")
    else:
        inputs = random.normal(size=(n, *shapes[kind])).astype(np.float32)
        inputs += labels.reshape(-1, *([1] * (inputs.ndim - 1))) / 2
    if kind == "values":
        task, targets = Task("regression"), inputs[:, :1] * 2
    if kind == "pairs":
        inputs = np.rec.fromarrays([inputs[:, :3], inputs[:, 3:]], dtype=[("left", "f4", (3,)), ("right", "f4", (3,))])
    train, validation, test = (
        Split(inputs[at], targets[at]) for at in np.split(np.arange(n), [n * 3 // 4, n * 7 // 8])
    )
    return Dataset(kind, task, train, validation, test, preprocessing, f"gallery-{kind}-{n}")


def _conv(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **more), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class _Joined(nn.Module):
    """Branches side by side: added, concatenated or multiplied."""

    def __init__(self, how: Literal["add", "cat", "multiply"], *branches: nn.Module) -> None:
        super().__init__()
        self.branches, self._how = nn.ModuleList(branches), how

    def forward(self, x: Tensor) -> Tensor:
        outs = [branch(x) for branch in self.branches]
        if self._how == "cat":
            return torch.cat(outs, 1)
        out: Tensor = outs[0]
        for other in outs[1:]:
            out = out + other if self._how == "add" else out * other
        return out


def residual() -> nn.Module:
    """Two residual blocks."""
    blocks = [_Joined("add", nn.Identity(), nn.Sequential(_conv(16, 16), _conv(16, 16))) for _ in range(2)]
    return nn.Sequential(_conv(3, 16), *blocks, _head(16))


def inception() -> nn.Module:
    """Branches of other kernels, side by side."""
    pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(16, 8, 1))
    return nn.Sequential(
        _conv(3, 16), _Joined("cat", _conv(16, 8, 1), _conv(16, 8), _conv(16, 8, 5), pooled), _head(32)
    )


def grouped() -> nn.Module:
    """Convolutions in 8 groups."""
    return nn.Sequential(_conv(3, 16), _conv(16, 32, groups=8), _conv(32, 32, groups=4), _head(32))


def depthwise() -> nn.Module:
    """Inverted residuals: MobileNet's."""
    block = nn.Sequential(_conv(16, 48, 1), _conv(48, 48, groups=48), nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16))
    return nn.Sequential(_conv(3, 16, stride=2), _Joined("add", nn.Identity(), block), _head(16))


def dense() -> nn.Module:
    """Each layer sees all before it."""
    layers = [_Joined("cat", nn.Identity(), _conv(16 + 8 * at, 8)) for at in range(3)]
    return nn.Sequential(_conv(3, 16), *layers, _head(40))


def transposed() -> nn.Module:
    """Down and up again."""
    up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(_conv(3, 16), _conv(16, 32, stride=2), up, _head(16))


class _Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.low = _conv(3, 16), nn.MaxPool2d(2), _conv(16, 16)
        self.after, self.head = _conv(32, 16), _head(16)

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x)
        low = functional.interpolate(self.low(self.down(high)), scale_factor=2.0, mode="nearest")
        out: Tensor = self.head(self.after(torch.cat([high, low], 1)))
        return out


def unet() -> nn.Module:
    """A way around the bottom."""
    return _Unet()


def channel_shuffled() -> nn.Module:
    """ShuffleNet's: groups that mix."""
    return nn.Sequential(
        _conv(3, 16), _conv(16, 16, groups=4), nn.ChannelShuffle(4), _conv(16, 16, groups=4), _head(16)
    )


def pixel_shuffled() -> nn.Module:
    """Channels become pixels."""
    return nn.Sequential(_conv(3, 16), nn.PixelUnshuffle(2), _conv(64, 32), nn.PixelShuffle(2), _conv(8, 16), _head(16))


class _Excited(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(x.mean((2, 3)))[:, :, None, None]
        return out


def squeeze_excited() -> nn.Module:
    """Channels weighed by what the whole picture shows."""
    return nn.Sequential(_conv(3, 16), _Excited(16), _conv(16, 16), _head(16))


class _Tutorial(nn.Module):
    """As tutorials have it: convolutions, `view`, dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 3 * 3, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 3 * 3)
        out: Tensor = self.fc2(functional.relu(self.fc1(x)))
        return out


def tutorial() -> nn.Module:
    """The tutorial's."""
    return _Tutorial()


class _Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(3 * 12 * 12, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.dense(x.view(x.size(0), -1))))
        return out


def viewed() -> nn.Module:
    """No convolution at all: pictures as rows."""
    return _Viewed()


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), _head(16)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x).relu()).relu()).relu())
        return out


def tied() -> nn.Module:
    """Two layers share their weights."""
    return _Tied()


def repeated() -> nn.Module:
    """One module, used three times."""
    block = _conv(16, 16)
    return nn.Sequential(_conv(3, 16), block, block, block, _head(16))


def frozen() -> nn.Module:
    """A backbone that learns nothing, in evaluation mode, and a head that learns."""
    backbone = nn.Sequential(_conv(3, 16), _conv(16, 16)).eval().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean += 0.5
    return nn.Sequential(backbone, _head(16))


def frozen_middle() -> nn.Module:
    """One layer in the middle learns nothing."""
    network = nn.Sequential(_conv(3, 16), _conv(16, 16), _conv(16, 16), _head(16))
    network[1].requires_grad_(False)
    return network


def lazy() -> nn.Module:
    """Layers that take their sizes from the first samples."""
    return nn.Sequential(
        nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(24), nn.ReLU(),
        nn.LazyLinear(CLASSES),
    )  # fmt: skip


def weight_normed() -> nn.Module:
    """Direction and length of the weights apart."""
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 16, 3)), nn.ReLU(), _head(16))


def spectral_normed() -> nn.Module:
    """The largest singular value is 1: it is followed from step to step in buffers."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 16, 3)), nn.ReLU(), _head(16))


class Answers(NamedTuple):
    """What a network with heads for training gives."""

    logits: Tensor
    aux: Tensor


class _Heads(nn.Module):
    def __init__(self, how: Literal["training", "tuple", "dict", "list"]) -> None:
        super().__init__()
        self.stem, self.rest, self._how = _conv(3, 16), _conv(16, 16), how
        self.aux, self.main = _head(16), _head(16)

    def forward(self, x: Tensor) -> Any:
        early = self.stem(x)
        main, aux = self.main(self.rest(early)), self.aux(early)
        if self._how == "training":
            return Answers(main, aux) if self.training else main
        if self._how == "dict":
            return OrderedDict(aux=aux, out=main)
        return (main, early) if self._how == "tuple" else [main, aux]


def double_headed() -> nn.Module:
    """A second head in training: GoogLeNet's."""
    return _Heads("training")


def several_outputs() -> nn.Module:
    """Answers and features."""
    return _Heads("tuple")


def named_outputs() -> nn.Module:
    """A dictionary: segmentation models' form."""
    return _Heads("dict")


def listed_outputs() -> nn.Module:
    """A list of answers."""
    return _Heads("list")


def softmaxed() -> nn.Module:
    """Ends in a softmax."""
    return nn.Sequential(_conv(3, 16), _head(16), nn.Softmax(dim=1))


def log_softmaxed() -> nn.Module:
    """Ends in the logarithm of a softmax."""
    return nn.Sequential(_conv(3, 16), _head(16), nn.LogSoftmax(dim=1))


def sigmoided() -> nn.Module:
    """Ends in a sigmoid."""
    return nn.Sequential(_conv(3, 16), _head(16), nn.Sigmoid())


def instance_normed() -> nn.Module:
    """Normalised by sample, with running statistics."""
    norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), _head(16))


def group_normed() -> nn.Module:
    """Normalised by groups of channels."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), _head(16))


class _Centred(nn.Module):
    """Keeps the mean of its inputs in a buffer of its own, which it replaces."""

    centre: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 2, 3))
            self.seen = self.seen + 1
        return x - self.centre[:, None, None]


def buffered() -> nn.Module:
    """Buffers of its own."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), _Centred(), nn.ReLU(), _head(16))


class _Strided(nn.Module):
    """Buffers that do not lie in one piece."""

    across: Tensor
    wide: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("across", torch.arange(32.0).view(2, 16).t() / 32)
        self.register_buffer("wide", torch.ones(1, 16).expand(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.across @ self.wide + x


def non_contiguous() -> nn.Module:
    """Buffers that are views."""
    return nn.Sequential(_conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _Strided(), nn.Linear(16, CLASSES))


class _Hyper(nn.Module):
    """The weights of a convolution come from a network."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.linspace(-1, 1, 8))
        self.maker, self.head = nn.Linear(8, 16 * 3 * 3 * 3), _head(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.conv2d(x, self.maker(self.code).view(16, 3, 3, 3) / 5).relu())
        return out


def hypernet() -> nn.Module:
    """A network makes another's weights."""
    return _Hyper()


class _Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Parameter(torch.randn(3, 12, 16) / 6), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.einsum("nchw,chk->nk", x, self.mix).relu())
        return out


def einsum() -> nn.Module:
    """One sum over many dimensions."""
    return _Einsum()


def dilated() -> nn.Module:
    """Kernels with holes."""
    wide = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
    return nn.Sequential(_conv(3, 16), wide, nn.ReLU(), nn.Conv2d(16, 16, (1, 3)), nn.Conv2d(16, 16, (3, 1)), _head(16))


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 3, stride=3)
        self.place = nn.Parameter(torch.zeros(1, 17, 16))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place)
        out: Tensor = self.out(x[:, 0])
        return out


def patched() -> nn.Module:
    """A vision transformer."""
    return _Patches()


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 3, stride=3), nn.LayerNorm(16)
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).relu().transpose(1, 2)
        out: Tensor = self.out((x + self.channels(x).relu()).mean(1))
        return out


def mixer() -> nn.Module:
    """Dense layers over places and over channels."""
    return _Mixer()


class _Next(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 48), nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.full((16,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(functional.gelu(self.wide(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


def next_block() -> nn.Module:
    """ConvNeXt's block: channels last inside, a scale that begins near zero."""
    return nn.Sequential(_conv(3, 16), _Next(), _head(16))


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[0], 1, 1, 1) > 0.2 if self.training else torch.ones(())
        keep = kept / 0.8 if self.training else kept
        out: Tensor = x + self.inner(x) * keep
        return out


def stochastic_depth() -> nn.Module:
    """Blocks that are left out at random, sample by sample."""
    return nn.Sequential(_conv(3, 16), _Dropped(), _head(16))


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = nn.Sequential(_conv(3, 16), _head(16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def idle() -> nn.Module:
    """A layer that nobody uses."""
    return _Idle()


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = _conv(3, 8), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        out: Tensor = self.out((x @ x.transpose(1, 2) / x.shape[2]).flatten(1))
        return out


def bilinear() -> nn.Module:
    """Products of features."""
    return _Bilinear()


def gated() -> nn.Module:
    """One branch opens the other."""
    gate = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid())
    return nn.Sequential(_Joined("multiply", nn.Conv2d(3, 16, 3, padding=1), gate), nn.PReLU(16), _head(16))


def all_convolutional() -> nn.Module:
    """Answers of shape `(n, classes, 1, 1)`."""
    return nn.Sequential(_conv(3, 16), nn.Conv2d(16, CLASSES, 1), nn.AdaptiveAvgPool2d(1))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], **more: Any) -> None:
        super().__init__()
        self.cells = kind(8, 12, batch_first=True, **more)
        self.out = nn.Linear(12 * (2 if more.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cells(x)[0][:, -1])
        return out


def lstm() -> nn.Module:
    """One after the other."""
    return _Recurrent(nn.LSTM)


def gru() -> nn.Module:
    """Both ways, two layers."""
    return _Recurrent(nn.GRU, bidirectional=True, num_layers=2)


class _Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first)
        self.layers, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layers(x).mean(1))
        return out


def encoder() -> nn.Module:
    """torch's transformer."""
    return _Encoder(batch_first=True)


class _Rotary(nn.Module):
    """Attention by places, whose table is made when it is first needed, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.Linear(8, 24), nn.Linear(8, CLASSES)
        self.table: tuple[Tensor, Tensor] | None = None

    def turned(self, x: Tensor) -> Tensor:
        """Pairs of features, turned by an angle that grows along the series."""
        if self.table is None or len(self.table[0]) < x.shape[1]:
            angles = torch.outer(torch.arange(x.shape[1]).float(), 10.0 ** -torch.arange(4).float())
            self.table = angles.cos(), angles.sin()
        cos, sin = (part[: x.shape[1]] for part in self.table)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(x).chunk(3, -1)
        scores = self.turned(query) @ self.turned(key).transpose(1, 2) / math.sqrt(8)
        out: Tensor = self.out((scores.softmax(-1) @ value).mean(1))
        return out


def rotary() -> nn.Module:
    """A table that is kept."""
    return _Rotary()


class _Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.conv(x.permute(0, 2, 1)).relu().amax(2))
        return out


def over_time() -> nn.Module:
    """A convolution along a series."""
    return _Times()


def one_dimensional() -> nn.Module:
    """Signals."""
    return nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 16, 3, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def three_dimensional() -> nn.Module:
    """Volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 2), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def normed_rows() -> nn.Module:
    """A perceptron with batch normalisation and dropout."""
    return nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, CLASSES))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(10, 3), nn.ModuleList(nn.Linear(10, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        out: Tensor = (torch.stack([expert(x) for expert in self.experts], -1) * weights[:, None]).sum(-1)
        return out


def experts() -> nn.Module:
    """A mixture of experts."""
    return _Experts()


class _Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).squeeze(-1)
        return out


def one_value() -> nn.Module:
    """A value for each sample, `(n,)`."""
    return _Value()


def mixing_encoder() -> nn.Module:
    """torch's transformer, which takes the batch for time."""
    return _Encoder(batch_first=False)


class _Across(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.softmax(self.body(x), 0))
        return out


def softmax_over_batch() -> nn.Module:
    """Softmax over the wrong dimension."""
    return _Across()


def no_running_statistics() -> nn.Module:
    """Batch normalisation by whatever batch there is, when serving too."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), _head(16))


class _Late(nn.Module):
    """Mixes samples with a weight that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.share = nn.Sequential(_conv(3, 16), _head(16)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + self.share * out.mean(0, keepdim=True)


def mixing_later() -> nn.Module:
    """At first each sample is for itself."""
    return _Late()


class _Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(_conv(3, 16), nn.AdaptiveAvgPool2d(1)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(x).squeeze())
        return out


def squeezed() -> nn.Module:
    """All dimensions of 1 go, the batch's too."""
    return _Squeezed()


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = nn.Sequential(_conv(3, 16), _head(16)), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        if out.abs().mean() > 1e-9:
            out = self.more(out)
        return out


def branching() -> nn.Module:
    """What it computes depends on what it sees."""
    return _Branching()


def all_frozen() -> nn.Module:
    """Nothing to learn."""
    return nn.Sequential(_conv(3, 16), _head(16)).requires_grad_(False)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(_conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(functional.dropout(self.body(x), 0.5))
        return out


def noisy() -> nn.Module:
    """Dropout when serving too."""
    return _Noisy()


class _Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16), nn.Conv2d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out if self.training else out.mean((2, 3))


def other_in_training() -> nn.Module:
    """Answers for each pixel, in training."""
    return _Pixels()


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, CLASSES), nn.Linear(3, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.left(left) + self.right(right)
        return out


def pair() -> nn.Module:
    """Two inputs."""
    return _Pair()


GALLERY: tuple[Specimen, ...] = (
    *(
        Specimen(factory.__name__)
        for factory in (
            residual, inception, grouped, depthwise, dense, transposed, unet, channel_shuffled, pixel_shuffled,
            squeeze_excited, tutorial, viewed, tied, repeated, frozen, frozen_middle, lazy, weight_normed,
            spectral_normed, double_headed, several_outputs, named_outputs, listed_outputs, softmaxed, log_softmaxed,
            sigmoided, instance_normed, group_normed, buffered, non_contiguous, hypernet, einsum, dilated, patched,
            mixer, next_block, stochastic_depth, idle, bilinear, gated, all_convolutional,
        )
    ),
    *(Specimen(factory.__name__, "series") for factory in (lstm, gru, rotary, over_time)),
    Specimen("encoder", "series", random=True),
    Specimen("one_dimensional", "signals"),
    Specimen("three_dimensional", "volumes"),
    Specimen("normed_rows", "rows", random=True),
    Specimen("experts", "rows"),
    Specimen("one_value", "values"),
    Specimen("mixing_encoder", "series", refused="batch_first"),
    Specimen("softmax_over_batch", refused="depends on the others"),
    Specimen("no_running_statistics", refused="running statistics"),
    Specimen("mixing_later", refused="depends on the others"),
    Specimen("squeezed", refused="one sample alone"),
    Specimen("branching", refused="depends on the values"),
    Specimen("all_frozen", refused="frozen"),
    Specimen("noisy", refused="call to call"),
    Specimen("other_in_training", refused="otherwise in training"),
    Specimen("pair", "pairs", refused="inputs"),
)  # fmt: skip
"""All of them."""


def specimen(name: str) -> Specimen:
    """The one of that name."""
    return next(one for one in GALLERY if one.name == name)
