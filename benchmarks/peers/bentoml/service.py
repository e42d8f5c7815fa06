"""The service: raw pixels become an array at the door, so that BentoML's own batching can join them."""

from typing import Annotated, Any

import bentoml
import numpy as np
from bench_model import INSTANCES, MAX_BATCH, SHAPE, Model
from bentoml.validators import ContentType
from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

# BentoML hands a body over as it is where its schema says that it is a string.
_RAW = (ContentType("application/octet-stream"), WithJsonSchema({"type": "string", "format": "binary"}))
Pixels = Annotated[Any, *_RAW, BeforeValidator(lambda body: np.frombuffer(body, np.uint8).reshape(1, *SHAPE))]
Floats = Annotated[Any, *_RAW, PlainSerializer(lambda answer: answer.tobytes())]


@bentoml.service(
    workers=INSTANCES,
    traffic={"timeout": 60, "max_concurrency": 1024},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    http={"cors": {"enabled": False}},
)
class Pictures:
    """3 KB of pixels in, 10 floats out."""

    def __init__(self) -> None:
        self.model = Model()

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=MAX_BATCH, max_latency_ms=1000)
    def infer(self, images: Pixels, /) -> Floats:
        """One batch."""
        return self.model.infer(images)
