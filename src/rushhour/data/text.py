"""Sentences as a data set: tokens of MiniLM's vocabulary, padded to one length, without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing, Text
from rushhour.data.dataset import Dataset, Split
from rushhour.data.splits import divide, keys_of
from rushhour.errors import DataError
from rushhour.system.storage import explained
from rushhour.task import Task

_FEWEST = 10
_DIMENSIONS = 384


def load_text(file: Path, *, seed: int = 0) -> Dataset:
    """The lines of a text file, UTF-8, one sample a line; empty ones are left out.

    Args:
        file: the file.
        seed: of the split, about 80 / 10 / 10.

    Raises:
        DataError: if it cannot be read, has too few lines, or the tokenizer is not installed.
        ModelError: if MiniLM is not installed.
        StorageError: if the disk fails.
    """
    if not file.is_file():
        raise DataError(f"there is no data at {file}", "the file does not exist", "check the path")
    try:
        with explained(f"read {file}"):
            lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {file}", f"it is not UTF-8: {error}", "convert it") from error
    return sentences(file.stem, [line for line in lines if line.strip()], seed=seed)


def sentences(name: str, lines: Sequence[str], *, length: int | None = None, seed: int = 0) -> Dataset:
    """Sentences as samples of the encoder MiniLM, split about 80 / 10 / 10, by content.

    A sample has three fields, each int64 of shape `(length,)`: `input_ids`, `attention_mask`, `token_type_ids`.

    Args:
        name: of the data set.
        lines: ten or more.
        length: tokens that each sentence is cut or padded to; 128 by default, as in the model's training.
        seed: of the split.

    Raises:
        DataError: if there are too few, or the tokenizer is not installed.
        ModelError: if MiniLM is not installed.
    """
    if len(lines) < _FEWEST:
        raise DataError(f"{name} has {len(lines)} sentences", f"a split needs at least {_FEWEST}", "give more text")
    samples = tokens(lines, length=length)
    whole = Split(samples, np.zeros((len(samples), 0), np.float32))
    rows = divide(keys_of((line.encode() for line in lines), seed=seed))
    train, validation, test = (whole.take(rows["train"]), whole.take(rows["validation"]), whole.take(rows["test"]))
    digest = hashlib.sha256(f"{samples.dtype}{seed}".encode())
    digest.update(samples.tobytes())
    return Dataset(
        name="".join(c if c.isalnum() else "-" for c in name).strip("-").lower()[:64] or "text",
        task=Task(kind="embedding", outputs=_DIMENSIONS),
        train=train,
        validation=validation,
        test=test,
        preprocessing=Preprocessing(),
        fingerprint=digest.hexdigest(),
    )


def tokens(lines: Sequence[str], *, length: int | None = None) -> NDArray[Any]:
    """Sentences as MiniLM's tokenizer splits them: a structured array of shape `(n,)`; see `sentences`.

    Raises:
        DataError: if the tokenizer is not installed.
        ModelError: if MiniLM is not installed.
    """
    from rushhour.models.minilm import INPUTS, LENGTH, pretrained

    length = length or LENGTH
    tokenizer = _tokenizer(pretrained() / "tokenizer.json")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    samples = np.zeros(len(lines), [(name, np.int64, (length,)) for name in INPUTS])
    for row, encoding in enumerate(tokenizer.encode_batch(list(lines))):
        for name, values in zip(INPUTS, (encoding.ids, encoding.attention_mask, encoding.type_ids), strict=True):
            samples[name][row] = values
    return samples


def bundle_tokens(bundle: Bundle, lines: Sequence[str]) -> NDArray[Any]:
    """Texts as the tokenizer of a bundle splits them: a structured array of shape `(n,)` with a field for each input.

    They are cut at the model's largest length, and padded to the longest of them, as the server does.

    Args:
        bundle: with a tokenizer.
        lines: one or more.

    Raises:
        DataError: if the library is not installed.
    """
    signature, text = bundle.manifest.signature, bundle.manifest.text
    assert isinstance(text, Text)
    (dimension,) = signature.dimensions
    tokenizer = _tokenizer(bundle.tokenizer)
    tokenizer.enable_truncation(dimension.largest)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(list(lines))
    length = max(dimension.smallest, *(len(each.ids) for each in encoded))
    samples = np.zeros(len(lines), [(spec.name, np.dtype(spec.dtype), (length,)) for spec in signature.inputs])
    for spec in signature.inputs:
        column = samples[spec.name]
        column[:] = dimension.padding.get(spec.name, 0)
        for row, each in zip(column, encoded, strict=True):
            values = getattr(each, text.inputs[spec.name])
            row[: len(values)] = values
    return samples


def _tokenizer(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("the tokenizer is not installed", str(error), "run `pip install 'rushhour[text]'`") from error
    return Tokenizer.from_file(str(file))
