"""Folders of transformers: pictures and texts become bundles; nothing is fetched, no pickle and no code is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="extra hf")

import transformers

import rushhour
from rushhour.compress import Distil, Prune, Recipe, Store, apply
from rushhour.data.arrays import from_arrays
from rushhour.errors import ModelError
from rushhour.models import load_deployed
from rushhour.models.doors import bring
from rushhour.models.doors.hugging_face import HuggingFaceDoor
from rushhour.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
PIXELS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
          "image_std": [0.25] * 3, "size": {"height": 16, "width": 16}}  # fmt: skip


def saved(model: Any, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def bert(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT, max_position_embeddings=32, **{**LABELS, **changes})
    return saved(transformers.BertForSequenceClassification(config), folder)


def resnet(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(num_channels=3, **sizes, **LABELS)
    return saved(transformers.ResNetForImageClassification(config).train(), folder, PIXELS)


@pytest.mark.slow
def test_texts_are_classified(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    brought = bring(str(folder))
    assert brought is not None
    assert isinstance(brought.door, HuggingFaceDoor)
    found = rushhour.import_model(folder, out=tmp_path / "out", length=12)
    understood = found.understood
    assert not understood.why_untrainable
    assert understood.task.classes == ("cat", "dog", "bird")
    assert understood.task_from == "id2label of its config.json"
    assert understood.from_original is not None
    assert understood.from_original < 1e-4
    (spec,) = found.bundle.manifest.signature.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("input_ids", "int64", (12,))
    tokens = torch.randint(1, 60, (3, 12))
    tokens[0, 5:] = 0
    original = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = original(input_ids=tokens, attention_mask=(tokens != 0).long()).logits.softmax(1)
        answers = load_deployed(found.bundle)(tokens)
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_texts_are_embedded_and_a_length_has_a_limit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=16
    )
    folder = saved(transformers.DistilBertModel(config), tmp_path / "distilbert")
    found = rushhour.import_model(folder, out=tmp_path / "out")
    assert (found.understood.task.kind, found.understood.task.outputs) == ("embedding", 32)
    assert found.bundle.manifest.signature.inputs[0].shape == (16,)
    with pytest.raises(ModelError, match="16 tokens at most, and 20 were asked for"):
        rushhour.import_model(folder, out=tmp_path / "no", length=20)


@pytest.mark.slow
def test_pictures_are_scaled_as_the_processor_says_and_the_network_is_pruned(tmp_path: Path) -> None:
    folder = resnet(tmp_path / "resnet")
    alone = rushhour.import_model(folder, out=tmp_path / "alone")
    (spec,) = alone.bundle.manifest.signature.inputs
    assert (spec.dtype, spec.shape) == ("uint8", (16, 16, 3))
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (120, 16, 16, 3)).astype(np.uint8)
    y = np.array(["bird", "cat", "dog"])[random.integers(0, 3, 120)]
    found = rushhour.import_model(folder, out=tmp_path / "out", data=(x, y))
    assert found.bundle.manifest.task.classes == ("cat", "dog", "bird")
    scaled = found.understood.preprocessing
    assert (scaled.mean, scaled.std) == ((0.5,) * 3, (0.25,) * 3)
    assert found.understood.preprocessing_from == "its preprocessor_config.json"
    original = transformers.ResNetForImageClassification.from_pretrained(folder).eval()
    pixels = (torch.from_numpy(x[:4]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = original(pixels).logits.softmax(1)
        answers = load_deployed(found.bundle)(torch.from_numpy(x[:4]))
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-4)
    data = from_arrays({"x": x, "y": y}, name="pictures", seed=0, task=found.bundle.manifest.task)
    recipe = Recipe((Prune(ratio=0.3, round_to=1, epochs=0), Distil(1)))
    *_, last = apply(recipe, found.bundle, data, Store(tmp_path / "store"), progress=Silent())
    assert last.manifest.parameters < found.bundle.manifest.parameters


@pytest.mark.slow
def test_a_vision_transformer_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        **LABELS,
    )  # fmt: skip
    folder = saved(transformers.ViTForImageClassification(config), tmp_path / "vit", PIXELS)
    assert not rushhour.import_model(folder, out=tmp_path / "out").understood.why_untrainable


def test_what_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings, content = json.loads(config.read_text()), weights.read_bytes()
    for changes, why in (
        ({"architectures": ["system"]}, "do not know 'system'"),
        ({"architectures": ["pipeline"]}, "do not know 'pipeline'"),
        ({"architectures": ["BertForTokenClassification"]}, "gives 32 x 3 numbers for a sample"),
        ({"hidden_size": 16}, "cannot read the model"),
        ({"architectures": [], "auto_map": {"AutoModel": "mine--x.Model"}}, "code of its own"),
    ):
        config.write_text(json.dumps({**settings, **changes}))
        with pytest.raises(ModelError, match=why):
            rushhour.import_model(folder, out=tmp_path / "out")
    config.write_text(json.dumps(settings))
    weights.write_bytes(content[:200])
    with pytest.raises(ModelError, match="cannot read the model"):
        rushhour.import_model(folder, out=tmp_path / "out")
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="other files of weights are pickles"):
        rushhour.import_model(folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config.write_text("[" * 100_000)
    assert bring(folder) is None
