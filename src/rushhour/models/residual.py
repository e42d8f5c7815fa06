"""A small residual network for pictures of any height and width."""

from __future__ import annotations

from torch import Tensor, nn

from rushhour.errors import ModelError

_LARGE = 96
"""From this picture size on, the stem halves it twice: full resolution would cost sixteen times as much."""


def residual(input_size: int, channels: int, classes: int, width: int = 16, blocks: int = 3) -> nn.Sequential:
    """The CIFAR form of ResNet (He et al. 2015, section 4.2): three stages, each half the size of the one before.

    Takes float32 `(n, channels, height, width)`, gives logits `(n, classes)`.

    Args:
        input_size: the longer side of a picture; decides only whether the stem makes it smaller first.
        channels: of a picture.
        classes: length of the answer.
        width: channels of the first stage; the others have two and four times as many.
        blocks: residual blocks in a stage; 3, 5, 7, 9 are ResNet-20, -32, -44, -56.

    Raises:
        ModelError: if a size is below one.
    """
    if min(input_size, channels, classes, width, blocks) < 1:
        raise ModelError(
            "cannot build the residual network",
            f"every size is at least 1, but got input_size={input_size}, channels={channels}, classes={classes}, "
            f"width={width}, blocks={blocks}",
            "use larger values",
        )
    large = input_size >= _LARGE
    stem: list[nn.Module] = [
        nn.Conv2d(channels, width, 7 if large else 3, stride=2 if large else 1, padding=3 if large else 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    if large:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    stages: list[nn.Module] = []
    before = width
    for stage in range(3):
        after = width * 2**stage
        for block in range(blocks):
            stages.append(_Block(before, after, stride=2 if stage > 0 and block == 0 else 1))
            before = after
    return nn.Sequential(*stem, *stages, _Mean(), nn.Linear(before, classes))


class _Block(nn.Module):
    """Two convolutions and a way around them, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.around = (
            nn.Identity()
            if before == after and stride == 1
            else nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.around(x))
        return out


class _Mean(nn.Module):
    """The mean over a picture, `(n, c, h, w)` to `(n, c)`: in ONNX one node, where adaptive pooling becomes nine."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))
