"""The deployment, with `@serve.batch`, on a Ray of this process's own."""

from __future__ import annotations

import os
import signal

import numpy as np
import ray
from bench_model import INSTANCES, MAX_BATCH, PORT, SHAPE, Model
from numpy.typing import NDArray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=INSTANCES, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5})
class Pictures:
    """3 KB of pixels in, 10 floats out."""

    def __init__(self) -> None:
        self.model = Model()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.001)
    async def batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """One batch."""
        return list(self.model.infer(np.stack(images)))

    async def __call__(self, request: Request) -> Response:
        """One request."""
        image = np.frombuffer(await request.body(), np.uint8).reshape(SHAPE)
        answer = await self.batch(image)
        return Response(answer.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until told to stop."""
    ray.init(
        num_cpus=INSTANCES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.path.join(os.environ["BENCH_WORK"], "ray"),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"enable_access_log": False})
    serve.run(Pictures.bind(), route_prefix="/infer")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
