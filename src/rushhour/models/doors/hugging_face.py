"""Folders of Hugging Face transformers: pictures, and texts of any length, classified, valued or embedded."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rushhour.bundle import OpenDimension, Preprocessing
from rushhour.errors import ModelError, TaskError
from rushhour.models.converted import checked_onnx
from rushhour.models.deployed import exported_graph
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.failure import why_failed
from rushhour.system.extras import require
from rushhour.task import Task

_CONFIG: Final = "config.json"
_PROCESSOR: Final = "preprocessor_config.json"
_TOKENIZER: Final = "tokenizer.json"
_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json")
_LONGEST: Final = 512
"""Tokens of a text, at most, where nothing else is said."""
_SAMPLES: Final = 16
_SAMPLE_TOKENS: Final = 64
_LARGEST_JSON: Final = 8_000_000
_LARGEST_TOKENIZER: Final = 64 * 2**20
_SIDES: Final = range(1, 10_001)


class HuggingFaceDoor:
    """Folders with `config.json` and `model.safetensors`. Nothing is fetched, and no code of the folder is run."""

    takes = "a folder of Hugging Face transformers"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By what its `config.json` says."""
        if not isinstance(model, Path) or not (model / _CONFIG).is_file():
            return False
        try:
            config = _read(model / _CONFIG)
        except ModelError:
            return False
        return "architectures" in config or "model_type" in config

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its graph, of the logits of one sample or of its embedding."""
        require("hf")
        config = _read(model / _CONFIG)
        network, name = _network(model, config, opening.shown)
        processor = _read(model / _PROCESSOR) if (model / _PROCESSOR).is_file() else {}
        if network.main_input_name == "pixel_values":
            return _of_pictures(network, name, processor, opening)
        if network.main_input_name == "input_ids":
            return _of_texts(network, name, opening, model / _TOKENIZER)
        raise ModelError(
            f"cannot import {opening.shown}",
            f"{name} takes {network.main_input_name}, and only pictures and texts are taken",
            "export it to ONNX, and import that file",
        )


class _Pictures(nn.Module):
    """One answer to each picture: logits, or the pooled features."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *samples: Tensor) -> Tensor:
        found = self.network(pixel_values=samples[0], return_dict=True)
        if "logits" in found:
            return found["logits"]  # type: ignore[no-any-return]
        pooled = found.get("pooler_output")
        answer: Tensor = found["last_hidden_state"].mean(1) if pooled is None else pooled
        return answer.flatten(1)


class _Texts(nn.Module):
    """One answer to each text: logits, or the mean of the tokens' features. What is padding follows from the tokens."""

    def __init__(self, network: Any, padding: int | None) -> None:
        super().__init__()
        self.network, self.padding = network, padding

    def forward(self, *samples: Tensor) -> Tensor:
        tokens = samples[0]
        mask = torch.ones_like(tokens) if self.padding is None else (tokens != self.padding).long()
        found = self.network(input_ids=tokens, attention_mask=mask, return_dict=True)
        if "logits" in found:
            return found["logits"]  # type: ignore[no-any-return]
        weights = mask.unsqueeze(2).to(torch.float32)
        features: Tensor = found["last_hidden_state"]
        return (features * weights).sum(1) / weights.sum(1).clamp(min=1)


def _network(folder: Path, config: dict[str, Any], shown: str) -> tuple[Any, str]:
    """The model of a folder and the name of its class, by the classes of the installed transformers alone."""
    import transformers

    names = [each for each in config.get("architectures") or () if isinstance(each, str)]
    if "auto_map" in config and not names:
        raise ModelError(
            f"cannot import {shown}", "it needs code of its own", "export it to ONNX, and import that file"
        )
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    base = transformers.PreTrainedModel
    if kind is not transformers.AutoModel and not (isinstance(kind, type) and issubclass(kind, base)):
        raise ModelError(
            f"cannot import {shown}",
            f"the installed transformers {transformers.__version__} do not know {names[0]!r}",
            "install a version that does, or export it to ONNX",
        )
    if not any((folder / each).is_file() for each in _WEIGHTS):
        raise ModelError(
            f"cannot import {shown}",
            f"it has no {_WEIGHTS[0]}: other files of weights are pickles, which can run code",
            "load it where you trust it, and write it again with model.save_pretrained(folder)",
        )
    try:
        with _quiet():
            network = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",
            )
    except Exception as error:  # a folder may be damaged in any way
        raise ModelError(
            f"cannot read the model {shown}", why_failed(error), "check that the folder is whole"
        ) from error
    return network.eval(), type(network).__name__


def _of_pictures(network: Any, name: str, processor: dict[str, Any], opening: Opening) -> Arrival:
    config = network.config
    height, width = opening.size or _sides(processor, config, opening.shown)
    channels = int(getattr(config, "num_channels", 3) or 3)
    example = torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)
    preprocessing, how = _scaling(processor, channels)
    notes = _resizing(processor, height, width)
    return _arrived(_Pictures(network), example, "pixel_values", name, opening, config, preprocessing, how, notes, {})


def _of_texts(network: Any, name: str, opening: Opening, tokenizer: Path) -> Arrival:
    config = network.config
    most = int(getattr(config, "max_position_embeddings", _LONGEST) or _LONGEST)
    padding = getattr(config, "pad_token_id", None)
    length = opening.length or min(most, _LONGEST)
    if length > most:
        raise ModelError(
            f"cannot import {opening.shown}",
            f"it takes {most} tokens at most, and {length} were asked for",
            "take fewer",
        )
    vocabulary = int(config.vocab_size)
    dimensions: tuple[OpenDimension, ...] = ()
    notes = [f"texts have {length} tokens: shorter ones are filled up, longer ones cut; --length changes it"]
    if opening.length is None:
        filling: dict[str, int | float] = {} if padding is None else {"input_ids": int(padding)}
        dimensions = (OpenDimension("length", length, {"input_ids": 0}, padding=filling),)
        notes = [f"texts have up to {length} tokens; --length fixes their number, and then it can be trained"]
    if padding is not None:
        notes.append(f"the attention mask is computed: every token but the padding ({padding}) counts")
    tokens = min(length, _SAMPLE_TOKENS) if dimensions else length
    example = torch.arange(2 * tokens).reshape(2, tokens) % vocabulary
    arrival = _arrived(
        _Texts(network, padding), example, "input_ids", name, opening, config, None, "", tuple(notes),
        {"input_ids": vocabulary}, dimensions,
    )  # fmt: skip
    if not dimensions:
        return arrival
    held = None
    if padding is not None and tokenizer.is_file():
        held = _content(tokenizer, _LARGEST_TOKENIZER)
        arrival = dataclasses.replace(arrival, notes=(*arrival.notes, f"texts are taken too: {_TOKENIZER} was found"))
    return dataclasses.replace(arrival, samples=_texts(vocabulary, padding, tokens), tokenizer=held)


def _texts(vocabulary: int, padding: int | None, longest: int) -> NDArray[np.int64]:
    """Random tokens of texts of different lengths, padded; of one length where there is no padding."""
    random = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(vocabulary), [-1 if padding is None else padding])
    samples: NDArray[np.int64] = random.choice(words, (_SAMPLES, longest)).astype(np.int64)
    if padding is not None:
        lengths = np.geomspace(min(4, longest), longest, _SAMPLES).round().astype(int)
        samples[np.arange(longest) >= lengths[:, None]] = padding
    return samples


def _arrived(
    network: nn.Module,
    example: Tensor,
    word: str,
    name: str,
    opening: Opening,
    config: Any,
    preprocessing: Preprocessing | None,
    how: str,
    notes: tuple[str, ...],
    limits: Mapping[str, int],
    dimensions: tuple[OpenDimension, ...] = (),
) -> Arrival:
    try:
        with _quiet(), torch.no_grad():
            shape = tuple(network(example).shape[1:])
    except Exception as error:  # any model may fail in its own way
        raise ModelError(
            f"cannot import {opening.shown}",
            f"{name} does not run on samples of {word} {tuple(example.shape[1:])}: {why_failed(error)}",
            "set --size or --length, or export it to ONNX",
        ) from error
    if len(shape) != 1:
        raise ModelError(
            f"cannot import {opening.shown}",
            f"{name} gives {' x '.join(map(str, shape))} numbers for a sample, and one row of answers is taken",
            "use a model that classifies, values or embeds whole samples",
        )
    task, task_from = _task(config, name, shape[0])
    with _quiet():
        graph = exported_graph(
            network, (example,), opening.name, [word], [task.output_name], optimize=False, dimensions=dimensions
        )

    def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        with torch.no_grad():
            return (network(torch.from_numpy(np.ascontiguousarray(columns[word]))).numpy(),)

    import transformers

    return Arrival(
        "transformers",
        checked_onnx(graph, opening.shown),
        f"transformers {transformers.__version__}, {name}",
        answers,
        limits=limits,
        dimensions=dimensions,
        task=task,
        task_from=task_from,
        preprocessing=preprocessing,
        preprocessing_from=how,
        notes=notes,
    )


def _task(config: Any, name: str, outputs: int) -> tuple[Task, str]:
    if "For" not in name:
        return Task("embedding", outputs=outputs), f"{name} has no head"
    labels = getattr(config, "id2label", None) or {}
    named = [str(labels.get(index, labels.get(str(index), index))) for index in range(outputs)]
    if outputs == 1 or getattr(config, "problem_type", None) == "regression":
        return Task("regression", outputs=outputs), "its config.json"
    with contextlib.suppress(TaskError):
        if len(set(named)) == len(named):
            return Task.classification(tuple(named)), "id2label of its config.json"
    return Task.classification(tuple(map(str, range(outputs)))), "the number of its outputs"


def _sides(processor: dict[str, Any], config: Any, shown: str) -> tuple[int, int]:
    """Height and width of a picture as the network takes it."""
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    for given in (crop, processor.get("size"), getattr(config, "image_size", None)):
        sides: tuple[Any, Any] = (None, None)
        if isinstance(given, int):
            sides = given, given
        elif isinstance(given, list | tuple) and len(given) == 2:
            sides = given[0], given[1]
        elif isinstance(given, dict):
            both = given.get("shortest_edge")
            sides = given.get("height", both), given.get("width", both)
        if all(isinstance(side, int) and side in _SIDES for side in sides):
            return sides
    raise ModelError(f"cannot import {shown}", "it does not say how large its pictures are", "set --size, as 224x224")


def _scaling(processor: dict[str, Any], channels: int) -> tuple[Preprocessing | None, str]:
    """What its processor does to pixels of 0 to 255; None where it says nothing."""
    if not processor:
        return None, ""
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    settings: dict[str, Any] = {"scale": scale, "layout": "NHWC->NCHW"}
    if processor.get("do_normalize"):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            values = processor.get(theirs)
            values = [values] * channels if isinstance(values, int | float) else values
            if not isinstance(values, list) or len(values) != channels:
                return None, ""
            settings[ours] = values
    try:
        return msgspec.convert(settings, type=Preprocessing), f"its {_PROCESSOR}"
    except msgspec.ValidationError:
        return None, ""


def _resizing(processor: dict[str, Any], height: int, width: int) -> tuple[str, ...]:
    if not processor.get("do_center_crop"):
        return ()
    return (f"its processor cuts out the middle of a picture; here whole pictures are brought to {height}x{width}",)


def _read(file: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ModelError: if it is none, or very large.
    """
    try:
        found = msgspec.json.decode(_content(file, _LARGEST_JSON))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelError(f"cannot read {file}", str(error) or "it is no JSON", "check the folder") from error
    if not isinstance(found, dict):
        raise ModelError(f"cannot read {file}", "it is no JSON object", "check the folder")
    return found


def _content(file: Path, most: int) -> bytes:
    """A file of up to so many bytes.

    Raises:
        ModelError: if it cannot be read, or is larger.
    """
    try:
        if file.stat().st_size > most:
            raise ModelError(f"cannot read {file}", "it is too large for a description of a model", "check the folder")
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}", str(error), "check the folder") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, logs and progress bars of transformers."""
    from transformers.utils import logging as its

    level, bars = its.get_verbosity(), its.is_progress_bar_enabled()
    its.set_verbosity(logging.CRITICAL)
    its.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        its.set_verbosity(level)
        if bars:
            its.enable_progress_bar()
