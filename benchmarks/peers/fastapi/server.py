"""FastAPI on uvicorn: what a developer writes first. One request, one inference, no batching."""

from __future__ import annotations

import numpy as np
import uvicorn
from bench_model import PORT, SHAPE, Model
from fastapi import FastAPI, Request, Response

app = FastAPI()
model = Model()


@app.post("/infer")
async def infer(request: Request) -> Response:
    """3 KB of pixels in, 10 floats out."""
    image = np.frombuffer(await request.body(), np.uint8).reshape(1, *SHAPE)
    return Response(model.infer(image).tobytes(), media_type="application/octet-stream")


@app.get("/ready")
def ready() -> Response:
    """The model is loaded before the server listens."""
    return Response()


if __name__ == "__main__":
    uvicorn.run(
        app, host="127.0.0.1", port=PORT, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
