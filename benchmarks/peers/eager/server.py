"""FastAPI with torch eager in a blocking `def`: what a user has before any tuning.

The environment says what to serve: BENCH_BUNDLE, the folder of a bundle with its torch module, and BENCH_PORT.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import uvicorn
from fastapi import Body, FastAPI, Response

from rushhour.bundle import Bundle
from rushhour.models import load_deployed

bundle = Bundle.open(Path(os.environ["BENCH_BUNDLE"]))
(spec,) = bundle.manifest.signature.inputs
module = load_deployed(bundle).eval()
app = FastAPI()


@app.post("/infer")
def infer(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Response:
    """The bytes of one sample; the answer is float32."""
    sample = np.frombuffer(body, spec.dtype).reshape(1, *spec.shape).copy()
    with torch.inference_mode():
        answer = module(torch.from_numpy(sample))
    return Response(answer.float().numpy().tobytes(), media_type="application/octet-stream")


@app.get("/ready")
def ready() -> Response:
    """The module is loaded before the server listens."""
    return Response()


if __name__ == "__main__":
    port = int(os.environ["BENCH_PORT"])
    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
