"""A layer that kills the process of one worker in the middle of a training."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

import torch.distributed as dist
from torch import Tensor, nn

KILLS: Final = "RUSHHOUR_TEST_KILLS"
"""RANK PASS FILE: this worker is killed in this forward pass, from 0, unless the file is there already."""


class Mortal(nn.Module):
    """Answers with what it is given, and ends its process when the environment wants it (`KILLS`)."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        if self.training and KILLS in os.environ and dist.is_initialized():
            rank, at, file = os.environ[KILLS].split(" ", 2)
            if dist.get_rank() == int(rank) and self._passes == int(at) and not Path(file).exists():
                Path(file).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self._passes += 1
        return x
