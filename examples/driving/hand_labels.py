"""How a Plan, or a bundle, agrees with boxes that were drawn one by one: AP50, mAP, and who is found.

python examples/driving/hand_labels.py runs/pedestrians/run runs/pedestrians/street/street.avi
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from rushhour.bundle import Bundle, is_bundle
from rushhour.data.boxes import read_boxes
from rushhour.data.frames import read_frames
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.plan import Plan
from rushhour.task import Task

BY_HAND = Path(__file__).with_name("by_hand.json")
SHOWN = 0.3
"""The score from which on the client shows a box."""


def served(path: Path) -> tuple[Bundle, EngineConfig]:
    """What the Plan of a run serves, or a bundle by itself."""
    if is_bundle(path):
        bundle = Bundle.open(path)
        return bundle, EngineConfig("openvino", bundle.manifest.precision, max_batch=8)
    variant = Plan.load(path / "plan.json").variants[0]
    return Bundle.open(path / variant.bundle), EngineConfig(variant.engine, variant.precision, max_batch=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run with a Plan, or a bundle")
    parser.add_argument("video", type=Path)
    parser.add_argument("--out", type=Path, help="also written as checks")
    arguments = parser.parse_args()
    bundle, config = served(arguments.model)
    (taken,), (given,) = bundle.manifest.signature.inputs, bundle.manifest.signature.outputs
    frames, wanted, numbers = read_frames(arguments.video, read_boxes(BY_HAND), taken.shape)
    engine = open_engine(bundle, config)
    answers = Runner(engine).infer({taken.name: frames})[given.name]
    engine.close()
    task = Task("detection", ("person",), 1)
    value, interval = task.evaluate(answers, wanted, np.arange(len(numbers)))
    kind = task.behaviour
    found = kind.statistics(answers, wanted)
    precise = kind.statistics(np.where(answers[..., 4:5] >= SHOWN, answers, 0), wanted)
    precision, recall = kind.curve(precise, 0)
    persons = int((wanted[..., 4] >= 0).sum())
    who, right = (f"{each[-1] if each is not None and len(each) else 0:.0%}" for each in (recall, precision))
    print(
        f"{len(numbers)} frames, {persons} persons drawn one by one: AP50 {value:.3f} ({interval[0]:.3f} to "
        f"{interval[1]:.3f}), mAP {kind.mean_average_precision(found):.3f}; above {SHOWN:g} it finds {who} of them, "
        f"and {right} of its boxes are right"
    )
    if arguments.out is not None:
        check = {
            "id": "hand", "what": f"AP50 against {persons} persons drawn one by one in {len(numbers)} test frames",
            "unit": "", "target": ">= 0", "value": round(value, 4), "interval": [round(each, 4) for each in interval],
            "n": len(numbers), "holds": True,
        }  # fmt: skip
        arguments.out.write_text(json.dumps([check]))


if __name__ == "__main__":
    main()
