"""LitServe: its API object with dynamic batching; the worker is a process of its own behind a queue."""

from typing import Annotated, Any

import litserve as ls
import numpy as np
from bench_model import INSTANCES, MAX_BATCH, PORT, SHAPE, Model
from fastapi import Body, Response
from numpy.typing import NDArray

Pixels = Annotated[bytes, Body(media_type="application/octet-stream")]


class Api(ls.LitAPI):
    """3 KB of pixels in, 10 floats out."""

    def setup(self, device: str) -> None:
        """In the worker."""
        self.model = Model()

    def decode_request(self, request: Pixels) -> NDArray[np.uint8]:
        """One request's pixels."""
        return np.frombuffer(request, np.uint8).reshape(SHAPE)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Requests to one array."""
        return np.stack(inputs)

    def predict(self, x: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One batch."""
        return self.model.infer(x)

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One array to answers."""
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> Response:
        """One answer's floats."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve."""
    api: Any = Api(max_batch_size=MAX_BATCH, batch_timeout=0.02)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=INSTANCES, timeout=False)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
