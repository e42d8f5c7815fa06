"""Whole networks, exported to ONNX by torch and brought back: the same answers, from layers that can be trained."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from rushhour.models import Preprocess, build, tensors_of
from rushhour.models.converted import convert, read_onnx, verify
from rushhour.models.deployed import main_output
from rushhour.testing.gallery import GALLERY, Specimen, data

FAST = ("residual", "patched", "lstm")
TRAINED = [one for one in GALLERY if not one.refused]


class Main(nn.Module):
    """The main output of a network."""

    def __init__(self, network: nn.Module, outputs: int) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, *inputs: Tensor) -> Tensor:
        return main_output(self.network(*inputs), self.outputs)


def exported(one: Specimen, file: Path) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with weights that are not fresh, in an ONNX file, and a tensor of a few samples for each input."""
    dataset = data(one.data)
    samples = tensors_of(dataset.train.inputs[:8])
    if len(samples) == 1:
        samples = (Preprocess(dataset.preprocessing)(samples[0]).contiguous(),)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build(one.source, (one.source.factory,)).train()
        with torch.no_grad():
            network(*samples)
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    whole = Main(network, dataset.task.outputs).eval()
    logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        free: Any = (tuple({0: batch} for _ in samples),)  # of `*inputs`
        program = torch.onnx.export(
            whole, tuple(each[:2] for each in samples), dynamo=True, dynamic_shapes=free, verbose=False
        )
    assert program is not None
    onnx.save(program.model_proto, file)
    return whole, samples


@pytest.mark.parametrize(
    "one",
    [pytest.param(one, id=one.name, marks=() if one.name in FAST else pytest.mark.slow) for one in TRAINED],
)
def test_a_network_comes_back_with_its_answers(tmp_path: Path, one: Specimen) -> None:
    network, samples = exported(one, tmp_path / "net.onnx")
    model = read_onnx(tmp_path / "net.onnx")
    found = convert(model, one.name, logits=one.data != "values")
    given = {spec.name: each.numpy() for spec, each in zip(model.graph.input, samples, strict=True)}
    assert verify(model, found, one.name, given) < 1e-4
    back = found.network()
    with torch.no_grad():
        expected, answer = network(*samples), back(*samples)
    answer = answer.softmax(1) if found.gives_logits else answer
    torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4)
    back.train()(*samples).sum().backward()
    trained = [parameter for parameter in back.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    kept = sum(parameter.numel() for parameter in trained)
    assert kept <= sum(parameter.numel() for parameter in network.parameters()) * 1.01 + 1
