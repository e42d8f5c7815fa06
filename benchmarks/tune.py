"""`make bench-tune`: what the tuner's answers are worth, and what they cost.

1      the article's network at 28x28 on Fashion-MNIST: capacity of the plan over that of the best plan of the untouched
       model and over torch eager behind FastAPI; load tests and minutes (tune_runs.py)
2.96   the same on photographs of solar cells at 96x96; 2.224 at 224x224, which takes hours
3      a small space of plans, each measured once: results/tune_space.json (tune_space.py)
3r     searches replayed on it: ours, random search, Optuna's TPE, a grid (tune_replays.py)
4      predicted against measured capacity on that space; policies a minute
5      the plan of part 1, served again on other seeds
6      races of two identical plans (tune_hard.py)
7      a search that is killed again and again
8      networks of other kinds: a sentence encoder, residual, MLP, an ONNX file
9      bad input

Each part stays in the record with the commit that it was measured at; `--only 3,6` measures these anew. What is trained
lies in .bench/machines and .bench/compress and is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from bench.networks import quantised, trained
from bench.parts import Part, run_parts, scale_of, scale_options
from tune_hard import bad_part, kills_part, races_part, replay_here
from tune_replays import predicted_part, replays_part
from tune_runs import Case, Other, others_part, repeats_part, run_part
from tune_space import bundles_of, exhaustive

from rushhour.bundle import Bundle
from rushhour.data import Dataset, load

RESULTS = Path(__file__).parent / "results" / "tune.json"
SPACE = Path(__file__).parent / "results" / "tune_space.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench"
SEED = 0
_TOKENS = 64


class Scale(msgspec.Struct, frozen=True):
    """The size of each part.

    Attributes:
        network: of parts 1, 5 and 6; `networks` are those of part 3, the first as reference.
        data: of all of them, as on the command line.
        epochs: of their training.
        budget: of the runs of parts 1 and 2; at 224x224 it is doubled.
        rounds: capacities of each contestant.
        plans: of the small space that are measured; 0 for all.
        windows: of open-loop load for each.
        every: so many plans the canary is measured.
        replays: of each search; `tests` load tests are allowed.
        learnt: plans that residuals are learnt from in part 4; `policies` are timed of each kind.
        repeats: windows of `seconds` of the shipped plan.
        races: of identical plans.
        kills: of one search.
        others: seconds of each run of part 8; `samples` of each part of the data, at most.
        kinds: of the networks of part 8.
        bad: budget of each run of part 9; `inputs` of it, all if empty.
    """

    network: str = "article"
    networks: str = "article,residual"
    data: str = "fashion-mnist"
    epochs: int = 2
    budget: str = "25m"
    rounds: int = 4
    plans: int = 0
    windows: int = 4
    every: int = 15
    replays: int = 100
    tests: int = 40
    learnt: int = 8
    policies: int = 2000
    repeats: int = 20
    seconds: float = 20.0
    races: int = 40
    kills: int = 10
    others: float = 420.0
    samples: int = 60_000
    kinds: str = "minilm,residual,mlp,onnx"
    bad: str = "180s"
    inputs: str = ""


class Bench:
    """One run of the benchmark.

    Args:
        scale: of the parts.
        work: where networks and runs are kept.
        space: the file of the small space.
    """

    def __init__(self, scale: Scale, work: Path, space: Path) -> None:
        self.scale = scale
        self.networks = work / "machines"
        self.runs = work / "tune"
        self.work = work
        self.space = space

    def trained(self, network: str) -> tuple[Bundle, Dataset]:
        """A reference network and its data."""
        data = load(self.scale.data)
        return trained(network, data, self.scale.epochs, self.networks), data

    def fashion(self) -> Part:
        """Part 1."""
        scale = self.scale
        reference, data = self.trained(scale.network)
        what = f"the {scale.network} network on {data.name}"
        case = Case("1", what, "p99<50ms", scale.budget, 3.0, 20.0, 30.0)
        return run_part(case, reference, data, scale.data, self.runs, scale.rounds)

    def elpv(self, side: int) -> Part:
        """Part 2 at one size of the pictures."""
        from compress import CASES, data_of, reference_of

        case = CASES["elpv" if side == 96 else "large"]
        data = data_of(case)
        reference = reference_of(case, data, self.work / "compress", 1.0)
        what = f"the article's network on solar cells at {side}x{side}"
        budget = self.scale.budget if side == 96 else "50m"
        today = None if side == 96 else 50.0
        asked = Case(f"2.{side}", what, "p99<100ms", budget, 5.0, today)
        return run_part(asked, reference, data, "elpv", self.runs, self.scale.rounds)

    def exhaustive(self) -> Part:
        """Part 3."""
        scale, data = self.scale, load(self.scale.data)
        bundles = bundles_of(scale.networks.split(","), data, scale.epochs, self.networks)
        sizes = {"plans": scale.plans, "windows": scale.windows, "every": scale.every}
        return exhaustive(bundles, data, self.runs, self.space, **sizes)

    def replays(self) -> Part:
        """Part 3r."""
        return replays_part(self._measured_space(), self.scale.replays, self.scale.tests)

    def predictions(self) -> Part:
        """Part 4."""
        import simulator

        part = predicted_part(self._measured_space(), SEED, self.scale.learnt)
        fast = simulator.speed(simulator.Scale(policies=self.scale.policies))
        renamed = (
            msgspec.structs.replace(check, id=f"4.policies.{check.id.partition('.')[2]}") for check in fast.checks
        )
        return Part((*part.checks, *renamed), (*part.tables, *fast.tables), part.measured)

    def repeats(self) -> Part:
        """Part 5."""
        run = self.runs / "run-1"
        if not (run / "plan.json").is_file():
            raise SystemExit("part 5 serves the plan of part 1 again, which is not there: measure `--only 1` first")
        return repeats_part(run, self.scale.repeats, self.scale.seconds)

    def races(self) -> Part:
        """Part 6."""
        reference, data = self.trained(self.scale.network)
        quantised(reference, data, self.networks)
        return races_part(self.scale.races, self.scale.network, self.networks)

    def kills(self) -> Part:
        """Part 7."""
        return kills_part(self._measured_space(), self.scale.kills)

    def others(self) -> Part:
        """Part 8."""
        kinds = {
            "minilm": Other("minilm", f"MiniLM on sentences of {_TOKENS} tokens, fidelity", self._minilm),
            "residual": Other("residual", "the residual network", lambda: self.trained("residual")),
            "mlp": Other("mlp", "the MLP", lambda: self.trained("mlp")),
            "onnx": Other("onnx", "an ONNX file of the MLP, without source", self._imported),
        }
        asked = [kinds[name] for name in self.scale.kinds.split(",")]
        return others_part(asked, self.runs, self.scale.others, self.scale.rounds)

    def _minilm(self) -> tuple[Bundle, Dataset]:
        from bench.graphs import cut, manual

        from rushhour.data.text import sentences
        from rushhour.models import minilm_bundle

        data = cut(sentences("python-reference", manual(), length=_TOKENS, seed=SEED), self.scale.samples)
        return minilm_bundle(self.networks / "minilm", data.validation.inputs[:32]), data

    def _imported(self) -> tuple[Bundle, Dataset]:
        from rushhour.models import from_onnx

        reference, data = self.trained("mlp")
        samples = data.validation.inputs[:32]
        return from_onnx(reference.model, data.task, self.networks / "mlp-onnx", samples=samples), data

    def bad(self) -> Part:
        """Part 9."""
        reference, _ = self.trained("mlp")
        scale = self.scale
        data = str(Path(scale.data).resolve()) if Path(scale.data).is_file() else scale.data
        return bad_part(reference.path.resolve(), data, scale.bad, self.runs / "bad", scale.inputs)

    def _measured_space(self) -> Path:
        if not self.space.is_file():
            raise SystemExit(f"there is no {self.space}: measure `--only 3` first")
        return self.space


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, measured anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    parser.add_argument("--space", type=Path, default=SPACE, help="the small space: written by part 3, read by others")
    parser.add_argument("--work", type=Path, default=BENCH, help="where networks and runs are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    scale_options(parser, Scale())
    arguments = parser.parse_args(given)
    if arguments.child:
        replay_here(**json.loads(arguments.child))
        return 0
    only = {name for name in arguments.only.split(",") if name}
    bench = Bench(scale_of(arguments, Scale), arguments.work, arguments.space)
    parts: dict[str, Callable[[], Part]] = {
        "1": bench.fashion,
        "2.96": lambda: bench.elpv(96),
        "2.224": lambda: bench.elpv(224),
        "3": bench.exhaustive,
        "3r": bench.replays,
        "4": bench.predictions,
        "5": bench.repeats,
        "6": bench.races,
        "7": bench.kills,
        "8": bench.others,
        "9": bench.bad,
    }
    return run_parts(
        parts,
        arguments.out,
        kept=True,
        only=only,
        timed={"1", "2.96", "2.224", "3", "5", "6", "8"},
        seeds={"first": SEED},
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
