"""`make bench-train-options`: what compressed gradients and workers that meet rarely cost and save.

The article's network on Fashion-MNIST, trained by replicas, with each option and several seeds. The reference is the
exact training by as many replicas with the same seed. What is trained is kept in `.bench/train-options`; a second run
goes on where the first was broken off. About a quarter of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import torch
from bench.parts import say, scale_of, scale_options
from bench.record import Check, Table, record, verdict
from scipy import stats

from rushhour.bundle import Bundle, Source
from rushhour.data import Dataset, load
from rushhour.errors import RushhourError
from rushhour.models import load_deployed
from rushhour.progress import Silent
from rushhour.system.storage import write_whole
from rushhour.train import ParallelSettings, Relaxed, TrainingJob, TrainSettings, train

RESULTS = Path(__file__).parent / "results" / "train_options.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench"
_DROP = "<= 1"
"""Points of accuracy that an option may cost."""

OPTIONS = {
    "exact": ParallelSettings("data", shared_memory=False),  # so that what it sends can be compared
    "fp16": ParallelSettings("data", compression="fp16"),
    "bf16": ParallelSettings("data", compression="bf16"),
    "powersgd": ParallelSettings("data", compression="powersgd"),
    "local SGD": ParallelSettings("data", relaxed=Relaxed(8)),
    "DiLoCo": ParallelSettings("data", relaxed=Relaxed(8, outer_lr=0.7, outer_momentum=0.9)),
}
_WORDS = {
    "fp16": "gradients halved to float16",
    "bf16": "gradients halved to bfloat16",
    "powersgd": "gradients cut to rank 2 (PowerSGD)",
    "local SGD": "weights averaged every 8 steps (local SGD)",
    "DiLoCo": "an outer optimizer every 8 steps (DiLoCo)",
}


class Scale(msgspec.Struct, frozen=True):
    """How much of everything.

    Attributes:
        seeds: trainings with each option.
        epochs: of each training.
        samples: of the training part, at most.
        workers: replicas.
    """

    seeds: int = 5
    epochs: int = 3
    samples: int = 12_000
    workers: int = 2


class Trained(msgspec.Struct, frozen=True):
    """One training.

    Attributes:
        accuracy: on the test part.
        sent_bytes: over the loopback while it lasted, all programs and both directions counted once.
        steps: of the optimizer.
    """

    option: str
    seed: int
    accuracy: float
    sent_bytes: int
    steps: int


def measure(option: str, seed: int, data: Dataset, scale: Scale, work: Path) -> Trained:
    """Train once, or read what an earlier run has left."""
    kept = work / f"{option.replace(' ', '-')}-{seed}-{scale.epochs}x{len(data.train)}x{scale.workers}.json"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(kept.read_bytes(), type=Trained)
    settings = TrainSettings(epochs=scale.epochs, seed=seed, bf16=False)
    source = Source("rushhour.models:article", {"input_size": 28, "channels": 1, "classes": 10, "width": 0.5})
    before = _loopback()
    job = TrainingJob(source, settings, work / "checkpoints", workers=scale.workers, parallel=OPTIONS[option])
    bundle = train(data, job, out=work / "bundle", progress=Silent())
    sent = _loopback() - before
    steps = scale.epochs * (len(data.train) // settings.batch)
    found = Trained(option, seed, accuracy(bundle, data), sent, steps)
    write_whole(kept, msgspec.json.encode(found))
    return found


def accuracy(bundle: Bundle, data: Dataset) -> float:
    """On the test part."""
    deployed = load_deployed(bundle).eval()
    with torch.inference_mode():
        answers = [deployed(torch.from_numpy(part)).numpy() for part in np.array_split(data.test.inputs, 40)]
    value, _ = data.task.evaluate(np.concatenate(answers), data.test.targets)
    return value


def judge(found: list[Trained]) -> tuple[list[Check], list[Table]]:
    """The loss of accuracy of each option, paired by seed, with Student's interval."""
    by = {(each.option, each.seed): each for each in found}
    seeds = sorted({each.seed for each in found})
    checks, rows = [], []
    for option in OPTIONS:
        values = [by[option, seed] for seed in seeds]
        drops = [100 * (by["exact", seed].accuracy - by[option, seed].accuracy) for seed in seeds]
        interval = None
        if option != "exact":
            if len(seeds) > 1:
                reach = stats.t.ppf(0.975, len(seeds) - 1) * np.std(drops, ddof=1) / len(seeds) ** 0.5
                interval = float(np.mean(drops) - reach), float(np.mean(drops) + reach)
            what = f"accuracy lost by {_WORDS[option]}"
            checks.append(
                verdict(option.replace(" ", "-").lower(), what, _DROP, float(np.mean(drops)), interval, len(seeds),
                        unit="points")
            )  # fmt: skip
        sent = float(np.median([each.sent_bytes / each.steps for each in values]))
        rows.append(
            (
                option,
                100 * float(np.mean([each.accuracy for each in values])),
                None if option == "exact" else float(np.mean(drops)),
                interval and f"[{interval[0]:.2g}, {interval[1]:.2g}]",
                sent / 1e6,
            )
        )
    columns = ("option", "accuracy, test (%)", "falls by (points)", "95%", "MB a step over the loopback")
    note = (
        "Means over the seeds. The bytes are those of the whole training, validation and start included, by the step; "
        "what other programs sent over the loopback meanwhile is in them."
    )
    return checks, [Table("What is not exact costs", columns, tuple(rows), note)]


def _loopback() -> int:
    """Bytes that the loopback has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def main(given: list[str] | None = None) -> int:
    """Measure, and write the record."""
    arguments = _arguments(given)
    scale = scale_of(arguments, Scale)
    began = time.monotonic()
    try:
        data = load("fashion-mnist")
        data = dataclasses.replace(
            data, train=data.train.head(scale.samples), fingerprint=f"{data.fingerprint}:{scale.samples}"
        )
        found = []
        for seed in range(scale.seeds):
            for option in OPTIONS:
                found.append(measure(option, seed, data, scale, arguments.work))
                say(f"{option}, seed {seed}: {found[-1].accuracy:.4f} ({(time.monotonic() - began) / 60:.1f} minutes)")
    except RushhourError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    checks, tables = judge(found)
    out = arguments.out or (RESULTS if arguments == _arguments([]) else BENCH / "train-options-smoke.json")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    record(checks, msgspec.to_builtins({"tables": tables, "measured": found}), {"first": 0}, {}).save(Path(out))
    for check in checks:
        say(f"{'ok  ' if check.holds else 'MISS'} {check.id:12} {check.value:>8.4g} {check.target} {check.why or ''}")
    say(f"written to {out}")
    return 0


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What compressed gradients and rare meetings cost in accuracy.")
    parser.add_argument("--work", type=Path, default=BENCH / "train-options", help="where trainings are kept")
    scale_options(parser, Scale())
    parser.add_argument("--out", help="the record; by default results/train_options.json of a whole run")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
