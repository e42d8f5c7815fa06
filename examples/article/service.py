"""The service that is written first: FastAPI around `model.predict`. `MODEL=article.keras uvicorn service:app`."""

import io
import os

import keras
import numpy as np
from fastapi import FastAPI, Request
from PIL import Image

app = FastAPI()
model = keras.saving.load_model(os.environ["MODEL"])
_, height, width, _ = model.input_shape


@app.post("/predict")
async def predict(request: Request) -> dict[str, list[float]]:
    picture = Image.open(io.BytesIO(await request.body())).convert("RGB").resize((width, height))
    pixels = np.asarray(picture, dtype="float32") / 255
    return {"probabilities": model.predict(pixels[None], verbose=0)[0].tolist()}
