"""FastAPI with `model.predict` in a blocking `def`: what a user of Keras has before any tuning.

The environment says what to serve: BENCH_MODEL, a `.keras` file, and BENCH_PORT.
"""

from __future__ import annotations

import os
from typing import Annotated

import keras
import numpy as np
import uvicorn
from fastapi import Body, FastAPI, Response

model = keras.saving.load_model(os.environ["BENCH_MODEL"], compile=False)
_, height, width, channels = model.input_shape
app = FastAPI()


@app.post("/infer")
def infer(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Response:
    """The pixels of one picture; the answer is float32."""
    pixels = np.frombuffer(body, np.uint8).reshape(1, height, width, channels).astype(np.float32) / 255
    return Response(np.asarray(model.predict(pixels, verbose=0)).tobytes(), media_type="application/octet-stream")


@app.get("/ready")
def ready() -> Response:
    """The model is loaded before the server listens."""
    return Response()


if __name__ == "__main__":
    port = int(os.environ["BENCH_PORT"])
    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
