"""What a training can be told: optimizers, schedules, averages, early end; and that each still resumes bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import ARTICLE, Notes, pictures, table, trained
from torch import nn

from rushhour.bundle import Bundle, Preprocessing, Source
from rushhour.data.augment import Augmentation
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, ModelError, StorageError
from rushhour.models import mlp
from rushhour.progress import Silent
from rushhour.records.curves import Epoch
from rushhour.task import Task
from rushhour.train import TrainingJob, TrainSettings, trained_weights
from rushhour.train.checkpoint import Checkpoint
from rushhour.train.feed import Feed
from rushhour.train.loss import loss_for

MLP = Source("rushhour.models:mlp", {"inputs": 5, "outputs": 2, "hidden": 8, "depth": 1})
EVERYTHING = [
    TrainSettings(epochs=3, batch=64, optimizer="adamw", weight_decay=0.1, schedule="cosine", warmup=0.2, bf16=False),
    TrainSettings(epochs=3, batch=64, optimizer="sgd", lr=0.05, schedule="step", ema=0.9, clip=0.5, bf16=False),
    TrainSettings(epochs=3, batch=64, optimizer="sgd", momentum=0.0, lr=0.05, accumulate=3, patience=1, bf16=False),
    TrainSettings(epochs=3, batch=64, schedule="constant", ema=0.99, patience=1, weight_decay=0.01),
]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learned(
    folder: Path, dataset: Dataset, source: Source, settings: TrainSettings, **options: Any
) -> dict[str, torch.Tensor]:
    progress, on_epoch = options.pop("progress", Silent()), options.pop("on_epoch", None)
    job = TrainingJob(source, settings, folder / "work", **options)
    return trained_weights(dataset, job, progress=progress, on_epoch=on_epoch)


class StopAt(Notes):
    def __init__(self, step: int) -> None:
        super().__init__()
        self._at = step

    def advance(self, by: float = 1.0, note: str = "") -> None:
        super().advance(by, note)
        if self.steps == self._at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("settings", EVERYTHING, ids=lambda settings: settings.optimizer + "-" + settings.schedule)
@pytest.mark.parametrize("stops_at", [4, 6])
def test_every_setting_resumes_bit_for_bit(settings: TrainSettings, stops_at: int, tmp_path: Path) -> None:
    dataset = table(400)  # 5 steps an epoch
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "a", dataset, MLP, settings, progress=StopAt(stops_at), checkpoint_every_s=0.0)
    notes = Notes()
    resumed = learned(tmp_path / "a", dataset, MLP, settings, progress=notes)
    assert notes.notes[0] == f"resumed after step {stops_at - 1}"
    assert same(resumed, learned(tmp_path / "b", dataset, MLP, settings))


def test_augmented_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch=64, augment=Augmentation.parse("flip,crop,rotate,scale,colour"))
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "a", pictures(), ARTICLE, settings, progress=StopAt(7), checkpoint_every_s=0.0)
    resumed = learned(tmp_path / "a", pictures(), ARTICLE, settings)
    assert same(resumed, learned(tmp_path / "b", pictures(), ARTICLE, settings))
    assert not same(resumed, learned(tmp_path / "c", pictures(), ARTICLE, TrainSettings(epochs=2, batch=64)))


def test_the_bundle_says_how_it_was_trained(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1, batch=160, clip=1.0, augment=Augmentation.parse("flip,rotate"))
    said = Bundle.open(trained(tmp_path, pictures(), ARTICLE, settings).path).manifest.lineage[0].settings
    assert (said["clip"], said["augment"], said["optimizer"]) == (1.0, "flip,rotate=10", "adam")
    assert "patience" not in said


def test_one_step_of_sgd_is_what_the_book_says(tmp_path: Path) -> None:
    """Gradient of the mean loss, then the clip's scale: computed here without the loop."""
    dataset = table(100)
    settings = TrainSettings(
        epochs=1, batch=20, optimizer="sgd", momentum=0.0, lr=0.1, schedule="constant", clip=0.01, bf16=False
    )
    torch.manual_seed(settings.seed)
    network = mlp(5, 2, 8, 1)
    rows = np.random.default_rng((0, 0)).permutation(20)
    outputs = network(torch.from_numpy(dataset.train.inputs[rows]))
    nn.functional.mse_loss(outputs, torch.from_numpy(dataset.train.targets[rows])).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))  # type: ignore[misc, union-attr]
    assert norm > 0.01
    got = learned(tmp_path, dataset, MLP, settings)
    for name, parameter in network.named_parameters():
        expected = parameter.detach() - 0.1 * gradients[name] * 0.01 / norm
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-7)


def test_accumulating_changes_nothing_but_memory(tmp_path: Path) -> None:
    def run(accumulate: int) -> dict[str, torch.Tensor]:
        settings = TrainSettings(epochs=1, batch=50, accumulate=accumulate, bf16=False)
        return learned(tmp_path / str(accumulate), table(), MLP, settings)

    whole = run(1)
    for name, tensor in run(7).items():  # 50 does not divide by 7: parts of 8 and 7 samples
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)


def test_the_average_of_the_weights_is_what_is_sealed(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1, batch=80, schedule="constant", bf16=False)
    seen: list[dict[str, torch.Tensor]] = []
    for steps in range(1, 5):
        with pytest.raises(KeyboardInterrupt):
            learned(tmp_path / "a", table(480), MLP, settings, progress=StopAt(steps + 1), checkpoint_every_s=0.0)
        (file,) = (tmp_path / "a" / "work").glob("*.safetensors")
        state = load_file(file)
        seen.append({name[8:]: state[name] for name in state if name.startswith("network.")})
    final = learned(tmp_path / "a", table(480), MLP, settings)
    expected = seen[0]
    for step, later in enumerate((*seen[1:], final), start=1):
        decay = min(0.5, (1 + step) / (10 + step))  # it warms up
        expected = {name: decay * expected[name] + (1 - decay) * later[name] for name in expected}
    settings = TrainSettings(epochs=1, batch=80, schedule="constant", bf16=False, ema=0.5)
    averaged = learned(tmp_path / "b", table(480), MLP, settings)
    for name in final:
        torch.testing.assert_close(averaged[name], expected[name])


def test_training_ends_early_and_the_best_epoch_is_sealed(tmp_path: Path) -> None:
    """A learning rate that ruins what was learned: the metric falls, and what was best is kept."""
    settings = TrainSettings(epochs=40, batch=32, lr=0.3, optimizer="sgd", schedule="constant", patience=3, bf16=False)
    heard: list[Epoch] = []
    kept = learned(tmp_path, table(200), MLP, settings, on_epoch=heard.append)
    values = [epoch.value for epoch in heard]
    best = int(np.argmax(values))
    assert len(heard) == best + 1 + 3 < 40
    longer = TrainSettings(epochs=40, batch=32, lr=0.3, optimizer="sgd", schedule="constant", patience=39, bf16=False)
    # stops at the first step after the best epoch, when its checkpoint is on disk
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "x", table(200), MLP, longer, progress=StopAt((best + 1) * 3 + 1))
    (file,) = (tmp_path / "x" / "work").glob("*.safetensors")
    state = load_file(file)
    for name, tensor in kept.items():
        assert torch.equal(tensor, state[f"network.{name}"])


def test_a_stopped_training_stays_stopped(tmp_path: Path) -> None:
    """Killed after its last epoch but before the bundle is sealed: nothing is trained any more."""
    settings = TrainSettings(epochs=40, batch=32, lr=0.3, optimizer="sgd", schedule="constant", patience=1, bf16=False)

    class Unsealed(Notes):
        def done(self, note: str = "", *, good: bool = True) -> None:
            raise KeyboardInterrupt

    first, notes = Unsealed(), Notes()
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path, table(200), MLP, settings, progress=first)
    learned(tmp_path, table(200), MLP, settings, progress=notes)
    assert notes.steps == first.steps < 120
    assert len(notes.notes) == 1


@pytest.mark.parametrize(
    ("schedule", "peak_at"), [("one-cycle", 5), ("cosine", 3), ("constant", 0), ("step", 0)]
)  # fmt: skip
def test_schedules_rise_and_fall_as_they_say(schedule: str, peak_at: int) -> None:
    settings = TrainSettings(schedule=schedule, warmup=0.2, lr=0.1)  # type: ignore[arg-type]
    optimizer = settings.make_optimizer([nn.Parameter(torch.zeros(1))])
    steps = settings.make_schedule(optimizer, 18)
    rates = []
    for _ in range(18):
        rates.append(steps.get_last_lr()[0])
        optimizer.step()
        steps.step()
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    falling = rates[peak_at + 1 :]
    if schedule == "constant":
        assert set(rates) == {0.1}
    elif schedule == "step":
        assert rates == pytest.approx([0.1] * 6 + [0.01] * 6 + [0.001] * 6)
    else:
        assert all(a < b for a, b in itertools.pairwise(rates[:peak_at]))
        assert all(a > b for a, b in itertools.pairwise(falling))
        assert rates[-1] < 0.01


def test_the_order_of_the_data_is_the_same_in_any_number_of_parts() -> None:
    dataset = table(200)
    with Feed(dataset.train, seed=3, batch=25) as whole:
        expected = [batch.rows.tolist() for batch in whole.epoch(2)]
        inputs = [batch.inputs[0] for batch in whole.epoch(2)]
    assert len(expected) == 4
    assert sorted(itertools.chain(*expected)) != list(itertools.chain(*expected))
    assert len(set(itertools.chain(*expected))) == 100
    parts = []
    for index in range(3):
        with Feed(dataset.train, seed=3, batch=25, threads=2, part=(index, 3)) as feed:
            parts.append(list(feed.epoch(2, 1)))
    for step, together in enumerate(zip(*parts, strict=True), start=1):
        assert all(batch.rows.tolist() == expected[step] for batch in together)
        assert torch.equal(torch.cat([batch.inputs[0] for batch in together]), inputs[step])


def with_extremes(dataset: Dataset, rows: list[int], value: float) -> Dataset:
    inputs = dataset.train.inputs.copy()
    inputs[rows] = value
    return Dataset(
        dataset.name, dataset.task, Split(inputs, dataset.train.targets), dataset.validation, dataset.test,
        dataset.preprocessing, "extremes",
    )  # fmt: skip


def test_a_loss_that_is_no_number_names_the_samples(tmp_path: Path) -> None:
    """Samples so large that their squares are infinite."""
    dataset = with_extremes(table(200), [17, 60], 3e38)
    order = np.random.default_rng((0, 0)).permutation(120)
    step = int(min(np.flatnonzero(np.isin(order, [17, 60]))) // 40)
    hit = sorted({17, 60} & set(order[step * 40 : step * 40 + 40].tolist()), key=order.tolist().index)
    settings = TrainSettings(epochs=2, batch=40, bf16=False)
    with pytest.raises(ModelError) as raised:
        learned(tmp_path, dataset, MLP, settings)
    assert f"in step {step + 1} of epoch 1" in str(raised.value)
    assert f"{len(hit)} of its 40 samples cause it: {', '.join(map(str, hit))} of the training part" in str(
        raised.value
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "lion"}, {"schedule": "linear"}, {"warmup": 1.0}, {"weight_decay": -1.0}, {"momentum": 1.0},
        {"clip": 0.0}, {"accumulate": 0}, {"accumulate": 200}, {"ema": 1.0}, {"patience": 0}, {"seed": -1},
        {"weight_decay": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=f"cannot train with {next(iter(wrong))}="):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def test_only_pictures_are_augmented(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot augment the samples of plane"):
        learned(tmp_path, table(), MLP, TrainSettings(augment=Augmentation(flip=True)))


def test_the_sum_of_parts_is_the_whole_loss() -> None:
    outputs, labels, values = torch.randn(10, 3), torch.arange(10) % 3, torch.randn(10, 3)
    for task, targets in ((Task.classification(("a", "b", "c")), labels), (Task("regression", outputs=3), values)):
        parts = [loss_for(task, "sum")(outputs[at], targets[at]) for at in (slice(0, 3), slice(3, 10))]
        torch.testing.assert_close(sum(parts) / 10, loss_for(task)(outputs, targets))
        torch.testing.assert_close(loss_for(task, "none")(outputs, targets).mean(), loss_for(task)(outputs, targets))


def test_a_write_that_fails_is_said_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    checkpoint = Checkpoint(tmp_path, "c" * 64)
    checkpoint.save(1, network, optimizer, schedule)
    before = checkpoint.path.read_bytes()
    checkpoint.path.unlink()
    checkpoint.path.mkdir()
    (checkpoint.path / "in the way").touch()
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.save(2, network, optimizer, schedule)
    (checkpoint.path / "in the way").unlink()
    checkpoint.path.rmdir()
    checkpoint.path.write_bytes(before)
    assert checkpoint.restore(network, optimizer, schedule) == 1


def test_weights_that_are_shared_are_written_and_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

    network, other = Tied(), Tied()
    optimizers = [torch.optim.Adam(each.parameters()) for each in (network, other)]
    schedules = [torch.optim.lr_scheduler.ConstantLR(each) for each in optimizers]
    network.two(network.one(torch.ones(1, 3))).sum().backward()
    optimizers[0].step()
    checkpoint = Checkpoint(tmp_path, "d" * 64)
    checkpoint.save(1, network, optimizers[0], schedules[0])
    assert checkpoint.restore(other, optimizers[1], schedules[1]) == 1
    assert torch.equal(other.two.weight, network.one.weight)
    moments = optimizers[1].state[other.one.weight]
    assert torch.equal(moments["exp_avg"], optimizers[0].state[network.one.weight]["exp_avg"])
    assert moments["step"] == 1


def test_a_plane_of_one_value_learns_too(tmp_path: Path) -> None:
    """Targets `(n, 1)` against outputs `(n, 1)`, without broadcasting."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(300, 5)).astype(np.float32)
    split = Split(inputs, inputs[:, :1] * 2)
    dataset = Dataset("line", Task("regression"), split, split.head(50), split.head(50), Preprocessing(), "one")
    source = Source("rushhour.models:mlp", {"inputs": 5, "outputs": 1, "hidden": 16, "depth": 1})
    heard: list[Epoch] = []
    settings = TrainSettings(epochs=10, batch=30, lr=1e-2, bf16=False)
    learned(tmp_path, dataset, source, settings, on_epoch=heard.append)
    assert heard[-1].value > 0.9
    assert heard[-1].loss < heard[0].loss
    assert [epoch.step for epoch in heard] == [10 * n for n in range(1, 11)]
