"""Pruning of ordinary networks of all kinds: what can go goes, what cannot stays as it is and is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Bundle, Preprocessing, Source, TensorSpec
from rushhour.compress import Prune, Recipe, Store, apply, compress, default_recipes
from rushhour.compress.prune import prune
from rushhour.compress.run import _check_rebuilt
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import ModelError, RushhourError
from rushhour.goal import AccuracyBudget
from rushhour.models import Deployed, build, export, load_deployed, resized
from rushhour.progress import Silent
from rushhour.task import Task

PICTURES = Preprocessing(1 / 255, (), (), "NHWC->NCHW")
TASK = Task.classification(("a", "b", "c", "d"))


def photographs(n: int = 96) -> Dataset:
    random = np.random.default_rng(0)
    inputs, labels = random.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), random.integers(0, 4, n)
    third = n // 3
    parts = [Split(inputs[at : at + third], labels[at : at + third]) for at in (0, third, 2 * third)]
    return Dataset("noise", TASK, *parts, PICTURES, "sum")


def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def mobile() -> nn.Module:
    """MobileNet: depthwise, then pointwise."""
    blocks = [nn.Sequential(_conv(a, a, groups=a), _conv(a, b, 1)) for a, b in ((16, 24), (24, 32))]
    return nn.Sequential(_conv(3, 16), *blocks, _head(32))


def inverted() -> nn.Module:
    """MobileNetV2: a wide depthwise layer between two narrow pointwise ones, and a way around them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(_conv(16, 48, 1), _conv(48, 48, groups=48), nn.Conv2d(48, 16, 1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.inner(x)
            return out

    return nn.Sequential(_conv(3, 16), Block(), Block(), _head(16))


def grouped(groups: int = 8) -> nn.Module:
    """ResNeXt: convolutions in groups."""
    return nn.Sequential(_conv(3, 32), _conv(32, 64, groups=groups), _conv(64, 64, groups=4), _head(64))


def multiplied() -> nn.Module:
    """Depthwise with two filters for each channel."""
    return nn.Sequential(_conv(3, 16), nn.Conv2d(16, 32, 3, padding=1, groups=16), _conv(32, 32), _head(32))


class Shuffle(nn.Module):
    """ShuffleNet: channels change places between groups."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffled() -> nn.Module:
    return nn.Sequential(_conv(3, 16), _conv(16, 32, 1, groups=2), Shuffle(), _conv(32, 32, groups=2), _conv(32, 32),
                         _conv(32, 32), _head(32))  # fmt: skip


class Concatenated(nn.Module):
    """DenseNet: each layer sees all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = _conv(3, 16), _conv(16, 16), _conv(32, 16)
        self.head = _head(48)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        c = self.third(torch.cat([a, b], 1))
        out: Tensor = self.head(torch.cat([a, b, c], 1))
        return out


class Squeezed(nn.Module):
    """Squeeze and excitation, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = _conv(3, 32), _conv(32, 32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.head = _head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        scale = torch.sigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        out: Tensor = self.head(x + y * scale)
        return out


class Recurrent(nn.Module):
    """Rows of a picture are steps."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.embed, self.wide = nn.Linear(24, 32), nn.Linear(32, 32)
        self.cell = getattr(nn, kind)(32, 24, batch_first=True)
        self.mix, self.head = nn.Linear(24, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.embed(x.permute(0, 2, 1, 3).flatten(2)))
        x, _ = self.cell(self.wide(x))
        out: Tensor = self.head(functional.relu(self.mix(x[:, -1])))
        return out


class Attentive(nn.Module):
    """One block of a transformer, by nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Linear(24, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(functional.gelu(self.up(self.last(x))))
        out: Tensor = self.head(x.mean(1))
        return out


def transposed() -> nn.Module:
    return nn.Sequential(
        _conv(3, 16, stride=2), nn.ConvTranspose2d(16, 24, 4, 2, 1), nn.ReLU(), _conv(24, 32),
        nn.ConvTranspose2d(32, 32, 2, 2, groups=4), _conv(32, 32), _head(32),
    )  # fmt: skip


def normed(new: bool) -> nn.Module:
    """A layer whose weights are computed from others, between two that have their own."""
    how = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm  # type: ignore[attr-defined]
    inner = nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(_conv(3, 16), how(inner), nn.ReLU(), _conv(16, 32), _conv(32, 32), _head(32))


class Summed(nn.Module):
    """einsum with a parameter of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 32), nn.Linear(32, 32)
        self.mix = nn.Parameter(torch.randn(32, 24) / 6)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.second(functional.relu(self.first(x.flatten(1)))))
        out: Tensor = self.head(torch.einsum("ni,ij->nj", x, self.mix))
        return out


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.third.weight = self.second.weight
        self.wide, self.head = nn.Linear(32, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third, self.wide):
            x = functional.relu(layer(x.flatten(1)))
        out: Tensor = self.head(x)
        return out


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = _conv(3, 16), _conv(16, 16), _conv(16, 32)
        self.head = _head(32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.last(self.again(self.again(self.first(x)))))
        return out


class Scaled(nn.Module):
    """A buffer of the network's own counts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5)
        self.first, self.second, self.third, self.head = _conv(3, 16), _conv(16, 16), _conv(16, 32), _head(32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x) * self.scale)))
        return out


class Masked(nn.Module):
    """Takes more than one argument: the samples of a batch are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(_conv(3, 16), _conv(16, 32)), _head(32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.body(x if mask is None else x * mask))
        return out


def pixels() -> nn.Module:
    """Channels become pixels."""
    return nn.Sequential(_conv(3, 16), nn.Conv2d(16, 32, 1), nn.PixelShuffle(2), _conv(8, 16), _head(16))


def group_normed() -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(a, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()) for a in (3, 32)]
    return nn.Sequential(*layers, nn.InstanceNorm2d(32, affine=True), _conv(32, 32), _head(32))


def flat() -> nn.Module:
    """One-dimensional, by way of a view."""
    line = nn.Sequential(nn.Conv1d(24, 32, 3, padding=1), nn.PReLU(32), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(nn.Flatten(1, 2), line, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 4))


def frozen_middle() -> nn.Module:
    network = nn.Sequential(_conv(3, 16), _conv(16, 16), _conv(16, 32), _conv(32, 32), _head(32))
    network[1].requires_grad_(False)
    return network


def frozen_norms() -> nn.Module:
    """As in fine-tuning: no normalisation learns."""
    network = nn.Sequential(_conv(3, 16), _conv(16, 32), _conv(32, 32), _head(32))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return network


def only_the_head() -> nn.Module:
    network = nn.Sequential(_conv(3, 16), _conv(16, 32), _head(32))
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    return network


class Backbone(nn.Module):
    """Frozen without a word: its features are computed without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16), _conv(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.wide, self.head = nn.Linear(32, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        out: Tensor = self.head(functional.relu(self.wide(x)))
        return out


def pruned(factory: Callable[[], nn.Module], step: Prune | None = None) -> tuple[Deployed, Deployed, dict[str, str]]:
    """The network before and after, and what stayed as it was and why; it can be built again from sizes."""
    torch.manual_seed(0)
    network = factory()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    before = Deployed(network, TASK, PICTURES).eval()
    after = Deployed(factory(), TASK, PICTURES).eval()
    after.network.load_state_dict(network.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in after.network.named_parameters()}
    kept = prune(after, photographs(), step or Prune(0.4, round_to=2), 0, seed=0, name="net")
    assert {name: parameter.requires_grad for name, parameter in after.network.named_parameters()} == flags
    samples = torch.from_numpy(photographs().test.inputs)
    with torch.no_grad():
        assert after(samples).shape == (32, 4)
    return before, after, kept


def smaller(before: Deployed, after: Deployed) -> float:
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (before, after)]
    return counts[1] / counts[0]


Arguments = dict[str, int | float | str | bool]


class NormedBlock(nn.Module):
    """A residual block: between its convolutions, groups of channels are normalised together."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(4, out), nn.GroupNorm(1, out, affine=False)])
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(functional.silu(self.norms[0](self.first(x))))
        return functional.silu(self.norms[1](out) + self.skip(x))


def residual_group_normed() -> nn.Module:
    return nn.Sequential(NormedBlock(3, 32), nn.MaxPool2d(2), NormedBlock(32, 64), _head(64))


FACTORIES: dict[str, tuple[str, float, str] | tuple[str, float, str, Arguments]] = {
    "depthwise": ("mobile", 0.75, ""),
    "inverted": ("inverted", 0.85, ""),
    "groups of 8": ("grouped", 0.8, ""),
    "groups of 2": ("grouped", 0.8, "", {"groups": 2}),
    "two filters a channel": ("multiplied", 1.0, "too few for 16 groups"),
    "shuffle": ("shuffled", 0.9, "depends on all"),
    "concatenation": ("Concatenated", 0.8, ""),
    "squeeze and excite": ("Squeezed", 0.8, ""),
    "LSTM": ("Recurrent", 0.95, "need all its channels"),
    "GRU": ("Recurrent", 0.95, "", {"kind": "GRU"}),
    "attention": ("Attentive", 0.9, "embed"),
    "transposed": ("transposed", 0.9, ""),
    "weight_norm, old": ("normed", 0.9, "computes its weights", {"new": False}),
    "weight_norm, new": ("normed", 0.9, "computes its weights", {"new": True}),
    "einsum": ("Summed", 0.8, ""),
    "tied": ("Tied", 0.95, "shares weights"),
    "called twice": ("Twice", 1.0, ""),
    "buffer": ("Scaled", 0.95, "depends on all"),
    "two arguments": ("Masked", 0.8, ""),
    "pixel shuffle": ("pixels", 1.0, "depends on all"),
    "group norm": ("group_normed", 0.95, ""),
    "group norm in residual blocks": ("residual_group_normed", 0.5, ""),
    "one-dimensional": ("flat", 0.8, ""),
    "frozen middle": ("frozen_middle", 0.9, "is frozen"),
    "frozen norms": ("frozen_norms", 0.8, ""),
    "backbone without gradients": ("Backbone", 0.95, "traced"),
}
"""Kind -> factory, what is left of its parameters at most, and a word on what stays as it was; its arguments."""


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", FACTORIES)
def test_what_can_go_goes_and_the_rest_is_named(kind: str) -> None:
    """Groups ended in an IndexError, a frozen layer in an AttributeError."""
    factory, most, word, *arguments = FACTORIES[kind]
    source = Source(f"test_prune:{factory}", *arguments)
    before, after, kept = pruned(lambda: build(source, (source.factory,)))
    assert smaller(before, after) <= most
    assert word in " ".join((*kept, *kept.values())), kept
    changed = {name for name, tensor in after.network.state_dict().items()
               if tensor.shape != before.network.state_dict()[name].shape}  # fmt: skip
    assert not {name for name in changed for layer in kept if name == f"{layer}.bias"}, "it was named as it was"
    again = build(resized(source, after.network, trusted=(source.factory,)), (source.factory,))
    again.load_state_dict(after.network.state_dict())
    samples = torch.from_numpy(photographs().test.inputs)
    with torch.no_grad():
        assert torch.allclose(Deployed(again, TASK, PICTURES).eval()(samples), after(samples), atol=1e-5)


def test_a_frozen_layer_keeps_every_weight() -> None:
    before, after, kept = pruned(frozen_middle)
    assert torch.equal(before.network[1][0].weight, after.network[1][0].weight)  # type: ignore[index]
    assert kept["1.0"] == "1.0 is frozen"
    assert kept["0.0"] == "its channels go into 1.0, which is frozen"
    assert set(kept) == {"0.0", "1.0"}


def test_tied_layers_stay_tied() -> None:
    _, after, kept = pruned(Tied)
    assert after.network.second.weight is after.network.third.weight  # type: ignore[union-attr]
    assert "shares weights with third" in kept["second"]


def test_groups_lose_the_same_places_each() -> None:
    """The grouped layer after it would else add up other channels."""
    before, after, _ = pruned(grouped)
    first, second = (after.network[at][0] for at in (0, 1))  # type: ignore[index]
    assert first.out_channels % 8 == 0 < 32 - first.out_channels
    assert (second.groups, second.in_channels) == (8, first.out_channels)
    old = before.network[0][0].weight  # type: ignore[index]
    rows = [int((old - row).abs().flatten(1).sum(1).argmin()) for row in first.weight]
    assert [row % 4 for row in rows[: len(rows) // 8]] * 8 == [row % 4 for row in rows]


# The whole step: from a bundle to a bundle.


def bundle_of(factory: str, path: Path) -> Bundle:
    source = Source(f"test_prune:{factory}")
    torch.manual_seed(0)
    return export(
        build(source, (source.factory,)),
        name=factory,
        task=TASK,
        sample_spec=TensorSpec("image", "uint8", (8, 8, 3)),
        preprocessing=PICTURES,
        source=source,
        lineage=(),
        samples=photographs().validation.inputs[:4],
        path=path,
    )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of("only_the_head", tmp_path_factory.mktemp("prune") / "head")


TRUSTED = tuple(
    f"test_prune:{name}" for name in ("only_the_head", "mobile", "grouped", "ends_in_softmax", "ends_in_sigmoid")
)


def ends_in_softmax() -> nn.Module:
    return nn.Sequential(_conv(3, 16), _conv(16, 32), _head(32), nn.Softmax(dim=1))


def ends_in_sigmoid() -> nn.Module:
    return nn.Sequential(_conv(3, 16), _conv(16, 32), _head(32), nn.Sigmoid())


@pytest.mark.parametrize("factory", ["ends_in_softmax", "ends_in_sigmoid"])
def test_a_network_that_gives_no_logits_is_pruned_too(factory: str, tmp_path: Path) -> None:
    """The network built from the new sizes was taken for one that gives logits, and so for another."""
    parent, data = bundle_of(factory, tmp_path / "parent"), photographs(80)
    recipe = Recipe.parse("prune:0.3:epochs=1")
    (made,) = apply(recipe, parent, data, Store(tmp_path), progress=Silent(), trusted=TRUSTED)
    assert made.manifest.parameters < parent.manifest.parameters
    with torch.no_grad():
        answers = load_deployed(made, TRUSTED)(torch.from_numpy(data.test.inputs))
    torch.testing.assert_close(answers.sum(1), torch.ones(len(answers)))


def test_where_only_the_head_learns_the_reason_is_said(head: Bundle, tmp_path: Path) -> None:
    """It said that no layer had enough channels."""
    steps = apply(Recipe.parse("prune:0.5"), head, photographs(), Store(tmp_path), progress=Silent(), trusted=TRUSTED)
    with pytest.raises(ModelError, match=r"nothing of only_the_head can be pruned: .*0\.0 \(0\.0 is frozen\)"):
        next(steps)


def test_a_step_that_can_do_nothing_leaves_the_others_to_be_done(head: Bundle, tmp_path: Path) -> None:
    made = compress(
        head,
        photographs(),
        [Recipe.parse("prune:0.5,bf16")],
        budget=AccuracyBudget(1.0),
        out=tmp_path / "out",
        steps=tmp_path / "steps",
        progress=Silent(),
        trusted=TRUSTED,
        engine="onnxruntime",
    )
    assert [attempt.recipe for attempt in made.attempts] == ["prune:0.5,bf16", "bf16"]
    assert "frozen" in made.attempts[0].why
    assert Bundle.open(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.long
def test_the_default_recipes_of_a_mobile_network_end_well(tmp_path: Path) -> None:
    """The first one that pruned ended all, and threw a finished int8 away."""
    parent, data = bundle_of("mobile", tmp_path / "parent"), photographs(240)
    made = compress(
        parent,
        data,
        default_recipes(parent, epochs=1, trusted=TRUSTED)[:2],
        budget=AccuracyBudget(1.0),
        out=tmp_path / "out",
        steps=tmp_path / "steps",
        progress=Silent(),
        trusted=TRUSTED,
    )
    assert [attempt.why for attempt in made.attempts] == ["", ""]
    small = Bundle.open(Path(made.attempts[1].stages[0].bundle))
    assert small.manifest.parameters < parent.manifest.parameters
    with torch.no_grad():
        assert load_deployed(small, TRUSTED)(torch.from_numpy(data.test.inputs)).shape == (80, 4)


def test_a_network_that_cannot_be_built_again_is_said_before_it_is_trained(head: Bundle) -> None:
    class Sized(nn.Module):
        """Keeps a size of its own beside its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.width = nn.Linear(192, 32), nn.Linear(32, 4), 32

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(functional.relu(self.first(x.flatten(1)))) * self.last.in_features / self.width
            return out

    changed = Deployed(Sized(), TASK, PICTURES)
    with pytest.raises(ModelError, match="cannot record how only_the_head was changed"):
        _check_rebuilt(changed, Source("test_prune:grouped"), head, TRUSTED)


def test_what_no_copy_can_be_made_of_is_said() -> None:
    def uncopied() -> nn.Module:
        network = nn.Sequential(_conv(3, 16), _conv(16, 32), _head(32))
        network.handle = (one for one in ())  # type: ignore[assignment]
        return network

    with pytest.raises(RushhourError, match="it cannot be copied: TypeError") as said:
        pruned(uncopied)
    assert "\n" not in str(said.value)


def test_labels_are_not_needed(tmp_path: Path) -> None:
    data = photographs()
    bare = Split(data.train.inputs, np.empty((len(data.train), 0), np.float32))
    deployed = Deployed(mobile(), TASK, PICTURES).eval()
    before = sum(parameter.numel() for parameter in deployed.parameters())
    prune(deployed, dataclasses.replace(data, train=bare), Prune(0.4, round_to=2), 0, seed=0, name="net")
    assert sum(parameter.numel() for parameter in deployed.parameters()) < before
    changed = resized(Source("test_prune:mobile"), deployed.network, trusted=TRUSTED)
    again = build(changed, TRUSTED)
    again.load_state_dict(deployed.network.state_dict())
    samples = torch.from_numpy(data.test.inputs)
    with torch.no_grad():
        assert torch.allclose(Deployed(again, TASK, PICTURES).eval()(samples), deployed(samples), atol=1e-5)
