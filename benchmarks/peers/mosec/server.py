"""mosec: a Rust server in front of Python workers, which get their batches over a Unix socket."""

from __future__ import annotations

import os
from pathlib import Path

# Read when mosec's server object is made.
os.environ |= {
    "MOSEC_ADDRESS": "127.0.0.1",
    "MOSEC_PORT": os.environ["BENCH_PORT"],
    "MOSEC_PATH": str(Path(os.environ["BENCH_WORK"]) / "mosec"),
    "MOSEC_LOG_LEVEL": "warning",
    "MOSEC_TIMEOUT": "10000",
}

import numpy as np
from bench_model import INSTANCES, MAX_BATCH, SHAPE, Model
from mosec import Server, Worker
from numpy.typing import NDArray

_WAIT_MS = 1  # the least; 0 means 10


class Pictures(Worker):
    """3 KB of pixels in, 10 floats out."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def deserialize(self, data: bytes) -> NDArray[np.uint8]:
        """One request's pixels."""
        return np.frombuffer(data, np.uint8).reshape(SHAPE)

    def forward(self, data: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """One batch."""
        return self.model.infer(np.stack(data))

    def serialize(self, data: NDArray[np.float32]) -> bytes:
        """One answer's floats."""
        return data.tobytes()


def main() -> None:
    """Serve."""
    server = Server()
    server.append_worker(Pictures, num=INSTANCES, max_batch_size=MAX_BATCH, max_wait_time=_WAIT_MS, route="/infer")
    server.run()


if __name__ == "__main__":
    main()
