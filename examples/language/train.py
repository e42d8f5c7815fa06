"""Train a classifier of texts on MiniLM in minutes: the encoder stays as it is, two linear models on it are trained.

python examples/language/train.py reviews.csv reviews-bundle

The table needs a column of texts and a column `label`; yours will do. Every text is encoded once. Then the weights of
the embedding and of the words are found by L-BFGS, with the penalty of which most of the validation part is right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rushhour.bundle import Step
from rushhour.data.dataset import Split
from rushhour.data.text_tables import load_text_table
from rushhour.models import text_classifier_bundle
from rushhour.models.minilm import INPUTS, pretrained_encoder

PENALTIES = (0.3, 1.0, 3.0, 10.0)
SCALE = 3.0
"""Of the embedding, beside words that count 1: the penalty weighs on it so much less."""
AT_ONCE = 64


def encoded(encoder: nn.Module, part: Split) -> torch.Tensor:
    """The embedding of each text `(n, 384)`; texts of like length are encoded together, without more padding."""
    lengths = part.inputs[INPUTS[1]].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    found = torch.empty(len(part), 384)
    with torch.inference_mode():
        for rows in np.array_split(order, max(1, len(order) // AT_ONCE)):
            longest = lengths[rows].max()
            found[rows] = encoder(*(torch.from_numpy(part.inputs[name][rows, :longest].copy()) for name in INPUTS))
    return found


def fitted(
    meaning: torch.Tensor,
    tokens: torch.Tensor,
    counted: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    penalty: float,
) -> tuple[nn.Linear, nn.Embedding]:
    """The two linear models, by maximum likelihood with an L2 penalty (which is added to the sum of the losses)."""
    linear, words = nn.Linear(meaning.shape[1], classes), nn.Embedding(30_522, classes)
    for weight in (linear.weight, linear.bias, words.weight):
        nn.init.zeros_(weight)
    parameters = [linear.weight, linear.bias, words.weight]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = linear(SCALE * meaning) + (words(tokens) * counted).sum(dim=1)
        weights = linear.weight.square().sum() + words.weight.square().sum()
        total = nn.functional.cross_entropy(logits, labels) + penalty / 2 * weights / len(labels)
        total.backward()
        return total

    optimizer.step(loss)
    return linear, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = load_text_table(arguments.data, seed=arguments.seed)
    for note in data.notes:
        print(note)
    encoder = pretrained_encoder()
    meanings = {name: encoded(encoder, getattr(data, name)) for name in ("train", "validation")}
    tensors = {}
    for name, part in (("train", data.train), ("validation", data.validation)):
        mask = torch.from_numpy(part.inputs[INPUTS[1]]).float()[:, :, None]
        tensors[name] = (meanings[name], torch.from_numpy(part.inputs[INPUTS[0]]), mask, torch.from_numpy(part.targets))
    best, chosen = -1.0, None
    for penalty in PENALTIES:
        linear, words = fitted(*tensors["train"], data.task.outputs, penalty)
        meaning, tokens, counted, labels = tensors["validation"]
        with torch.inference_mode():
            logits = linear(SCALE * meaning) + (words(tokens) * counted).sum(dim=1)
        accuracy = float((logits.argmax(dim=1) == labels).float().mean())
        print(f"penalty {penalty:g}: {accuracy:.4f} of the validation part are right")
        if accuracy > best:
            best, chosen = accuracy, (penalty, linear, words)
    penalty, linear, words = chosen
    text_classifier_bundle(
        arguments.out,
        data.train.inputs[:16],
        data.task,
        meaning=SCALE * linear.weight.detach().numpy(),
        words=words.weight.detach().numpy(),
        bias=linear.bias.detach().numpy(),
        name=arguments.data.stem,
        lineage=(Step("linear models trained", {"penalty": penalty, "texts": len(data.train), "accuracy": best}),),
    )
    print(f"{arguments.out}: a bundle that takes texts")


if __name__ == "__main__":
    main()
