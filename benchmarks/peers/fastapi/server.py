"""FastAPI on uvicorn: what a developer writes first. One request, one inference, no batching."""

from __future__ import annotations

import threading
from typing import Annotated

import numpy as np
import uvicorn
from bench_model import PORT, SHAPE, WAY, Model
from fastapi import Body, FastAPI, Request, Response

app = FastAPI()
model = Model()
alone = threading.Lock()


def answer(body: bytes) -> Response:
    """10 floats to 3 KB of pixels."""
    image = np.frombuffer(body, np.uint8).reshape(1, *SHAPE)
    return Response(model.infer(image).tobytes(), media_type="application/octet-stream")


if WAY == "threads":

    @app.post("/infer")
    def infer_on_a_thread(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Response:
        """Off the loop, which goes on reading and writing meanwhile."""
        with alone:
            return answer(body)

else:

    @app.post("/infer")
    async def infer_on_the_loop(request: Request) -> Response:
        """The loop waits for the engine."""
        return answer(await request.body())


@app.get("/ready")
def ready() -> Response:
    """The model is loaded before the server listens."""
    return Response()


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=PORT, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
