"""Train a classifier of texts on MiniLM in minutes: its last layers, and two linear models on them.

python examples/language/train.py reviews.csv reviews-bundle --rating rating

The table needs a column of texts and a column `label`; yours will do. Every text goes once through the layers that stay
as they are. Then the last layers are trained, with the weights of the embedding and of the words. What is kept is the
epoch of which most of the validation part is right.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rushhour.bundle import Step
from rushhour.data.dataset import Split
from rushhour.data.text import tokens
from rushhour.data.text_tables import load_text_table
from rushhour.models import text_classifier_bundle
from rushhour.models.minilm import INPUTS, pretrained_encoder

SCALE = 10.0
"""Of the embedding, whose length is 1, beside words that count 1."""
TRAINED = 2
"""Layers of the encoder, the last ones, that are trained."""
BATCH, WARM_UP = 32, 0.1
RATE, DECAY = 1e-4, 0.01
"""Of the layers; the linear models learn ten times as fast, and a word's weight decays as much faster: it is rare."""
AT_ONCE = 64


class Part:
    """A part of the data after the layers that stay: their states, without padding, and what is to be answered."""

    def __init__(self, encoder: nn.Module, part: Split, wanted: torch.Tensor) -> None:
        self.ids, mask = (torch.from_numpy(part.inputs[name].copy()) for name in INPUTS[:2])
        self.lengths, self.wanted = mask.sum(dim=1), wanted
        self.labels = torch.from_numpy(np.array(part.targets))
        self.states: list[torch.Tensor] = [torch.empty(0)] * len(part)
        with torch.inference_mode():
            for rows in self.alike(AT_ONCE):
                ids, mask = self.tokens(rows)
                states = encoder.words(ids) + encoder.segments.weight[0] + encoder.positions.weight[: ids.shape[1]]
                states = through(encoder.layers[:-TRAINED], encoder.norm(states), mask)
                for row, own in zip(rows.tolist(), states, strict=True):
                    self.states[row] = own[: self.lengths[row]].half()

    def alike(self, size: int, chance: np.random.Generator | None = None) -> list[torch.Tensor]:
        """The rows in batches of like length, so that there is little padding; by chance, or from short to long."""
        if chance is None:
            order = np.argsort(self.lengths.numpy(), kind="stable")
            return [torch.from_numpy(rows) for rows in np.array_split(order, -(-len(order) // size))]
        mixed = np.array_split(chance.permutation(len(self.lengths)), -(-len(self.lengths) // (16 * size)))
        batches = [
            torch.from_numpy(rows)
            for some in mixed
            for rows in np.array_split(some[np.argsort(self.lengths.numpy()[some])], -(-len(some) // size))
        ]
        return [batches[at] for at in chance.permutation(len(batches))]

    def tokens(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Their ids, and a mask of the tokens that are there."""
        longest = int(self.lengths[rows].max())
        return self.ids[rows, :longest], (torch.arange(longest) < self.lengths[rows][:, None]).float()


class Head(nn.Module):
    """The last layers, and the two linear models: of the embedding, and of the words."""

    def __init__(self, layers: nn.ModuleList, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.meaning = nn.Linear(layers[0].norm.normalized_shape[0], classes)
        self.words = nn.Embedding(30_522, classes)
        for weight in (self.meaning.weight, self.meaning.bias, self.words.weight):
            nn.init.zeros_(weight)

    def embedding(self, part: Part, rows: torch.Tensor) -> torch.Tensor:
        _, mask = part.tokens(rows)
        states = nn.utils.rnn.pad_sequence([part.states[row].float() for row in rows.tolist()], batch_first=True)
        states, counted = through(self.layers, states, mask), mask[:, :, None]
        return nn.functional.normalize((states * counted).sum(dim=1) / counted.sum(dim=1), dim=1)

    def logits(self, part: Part, rows: torch.Tensor) -> torch.Tensor:
        ids, mask = part.tokens(rows)
        words = (self.words(ids) * mask[:, :, None]).sum(dim=1)
        return self.meaning(SCALE * self.embedding(part, rows)) + words

    def accuracy(self, part: Part) -> float:
        """The share of a part that it is right about."""
        with torch.inference_mode():
            right = sum(
                int((self.logits(part, rows).argmax(dim=1) == part.labels[rows]).sum()) for rows in part.alike(AT_ONCE)
            )
        return right / len(part.labels)


def through(layers: nn.ModuleList, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States after some layers of the encoder; as its own `forward`."""
    bias = ((1.0 - mask) * -1e4)[:, None, None, :]
    for layer in layers:
        states = layer(states, bias)
    return states


def fine_tune(head: Head, part: Part, epochs: int, seed: int) -> Iterator[int]:
    """Train all of the head; after each epoch its number."""
    groups = [
        {"params": head.layers.parameters(), "lr": RATE},
        {"params": head.meaning.parameters(), "lr": 10 * RATE},
        {"params": head.words.parameters(), "lr": 10 * RATE, "weight_decay": 10 * DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    steps = epochs * len(part.alike(BATCH, np.random.default_rng(seed)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), max(0.0, (steps - step) / ((1 - WARM_UP) * steps)))
    )
    for epoch in range(epochs):
        for rows in part.alike(BATCH, np.random.default_rng([seed, epoch])):
            optimizer.zero_grad()
            logits = head.logits(part, rows)
            nn.functional.cross_entropy(logits, part.wanted[rows]).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield epoch + 1


def wanted_of(part: Split, classes: int, ratings: dict[bytes, float]) -> torch.Tensor:
    """The probabilities that are asked for, `(n, classes)`: 1 for the label, or what its rating says of two classes."""
    wanted = nn.functional.one_hot(torch.from_numpy(np.array(part.targets)), classes).float()
    if not ratings:
        return wanted
    strength = torch.tensor([ratings[row.tobytes()] for row in part.inputs[INPUTS[0]]])
    if classes != 2 or not torch.equal(strength > 0, wanted[:, 1] > 0):
        raise SystemExit("a rating is above 0 for the second of two classes in alphabetical order, below for the first")
    second = torch.sigmoid(strength)
    return torch.stack([1 - second, second], dim=1)


def ratings_in(file: Path, column: str) -> dict[bytes, float]:
    """Tokens of a text -> its rating."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    found = tokens([row["text"] for row in rows])[INPUTS[0]]
    return {ids.tobytes(): float(row[column]) for ids, row in zip(found, rows, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order")
    parser.add_argument("--rating", default="", help="column of numbers: how sure a label is; see the README")
    parser.add_argument("--epochs", type=int, default=1, help="over the training part")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = load_text_table(arguments.data, seed=arguments.seed)
    for note in data.notes:
        print(note)
    ratings = ratings_in(arguments.data, arguments.rating) if arguments.rating else {}
    encoder, classes = pretrained_encoder(), data.task.outputs
    train, validation = (
        Part(encoder, part, wanted_of(part, classes, ratings)) for part in (data.train, data.validation)
    )
    head = Head(encoder.layers[-TRAINED:], classes)
    best, chosen = -1.0, head
    for epoch in fine_tune(head, train, arguments.epochs, arguments.seed):
        accuracy = head.accuracy(validation)
        print(f"epoch {epoch}: {accuracy:.4f} of the validation part are right", flush=True)
        if accuracy > best:
            best, chosen = accuracy, copy.deepcopy(head)
    for place, layer in enumerate(chosen.layers, len(encoder.layers) - TRAINED):
        encoder.layers[place] = layer
    text_classifier_bundle(
        arguments.out,
        data.train.inputs[:16],
        data.task,
        meaning=SCALE * chosen.meaning.weight.detach().numpy(),
        words=chosen.words.weight.detach().numpy(),
        bias=chosen.meaning.bias.detach().numpy(),
        name=arguments.data.stem,
        encoder=encoder,
        lineage=(Step("classifier trained", {"layers": TRAINED, "texts": len(data.train), "accuracy": best}),),
    )
    print(f"{arguments.out}: a bundle that takes texts")


if __name__ == "__main__":
    main()
