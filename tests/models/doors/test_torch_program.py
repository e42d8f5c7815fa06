"""What torch.export gave: an object, or a trusted `.pt2` file with a free number of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import rushhour
from rushhour.errors import ModelError
from rushhour.models.doors import bring
from rushhour.models.doors.torch_program import TorchProgramDoor

pytestmark = pytest.mark.filterwarnings("ignore")


def exported(batch: bool = True, *, network: nn.Module | None = None) -> ExportedProgram:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    network = network or nn.Sequential(*layers)
    free: Any = ({0: Dim("batch")},) if batch else None
    return torch.export.export(network.eval(), (torch.randn(2, 1, 8, 8),), dynamic_shapes=free)


def saved(program: ExportedProgram, file: Path) -> Path:
    torch.export.save(program, file)
    return file


def test_a_file_is_opened_only_if_it_is_trusted(tmp_path: Path) -> None:
    file = saved(exported(), tmp_path / "net.pt2")
    brought = bring(file)
    assert brought is not None
    assert isinstance(brought.door, TorchProgramDoor)
    with pytest.raises(ModelError, match=r"loading one can run code of the file; .* use --trust .*net.pt2"):
        rushhour.import_model(file, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = rushhour.import_model(file, out=tmp_path / "out", trust=str(file), classes="a,b,c")
    assert not found.understood.why_untrainable
    assert found.understood.format == "pt2"
    assert found.understood.from_original is not None
    assert found.understood.from_original < 1e-5
    assert sum(found.understood.layers.values()) >= 2


def test_an_object_needs_no_trust(tmp_path: Path) -> None:
    found = rushhour.import_model(exported(), out=tmp_path / "out")
    assert not found.understood.why_untrainable
    assert found.understood.file == "the ExportedProgram"


def test_a_fixed_number_of_samples_is_refused_with_how_to_export(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fixed to 2; use torch.export.export\(net, \(x,\), dynamic_shapes"):
        rushhour.import_model(exported(batch=False), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((1, 2, 3)).unsqueeze(1), x.amax((2, 3))


def test_several_outputs_are_served_as_they_are(tmp_path: Path) -> None:
    found = rushhour.import_model(exported(network=Two()), out=tmp_path / "out")
    assert "2 outputs" in found.understood.why_untrainable
    assert [spec.name for spec in found.bundle.manifest.signature.outputs] == ["output_0", "output_1"]


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    file = saved(exported(), tmp_path / "net.pt2")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    file.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read the model"):
        rushhour.import_model(file, out=tmp_path / "out", trust=str(file))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"a pickle of torch.save.*module:factory"):
        rushhour.import_model(tmp_path / "weights.pt", out=tmp_path / "out")
    with pytest.raises(ModelError, match=r"a pickle of torch.save"):
        rushhour.train(tmp_path / "weights.pt", (np.ones((20, 2)), np.ones(20)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
