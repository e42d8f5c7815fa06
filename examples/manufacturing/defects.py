"""A client: send the cells of a module's picture to a server, and draw the map of their defect scores.

python examples/manufacturing/defects.py http://127.0.0.1:8000 module.png map.png
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classify import ask


def encoded(cell: Image.Image) -> str:
    """A cell as a PNG in Base64: the server decodes it and brings it to the model's size."""
    file = io.BytesIO()
    cell.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server")
    parser.add_argument("module", type=Path, help="a picture; beside it may be a .json with the truth")
    parser.add_argument("out", type=Path, help="the picture with the map")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=10)
    arguments = parser.parse_args()
    rows, columns = arguments.rows, arguments.columns
    module = Image.open(arguments.module).convert("L")
    wide, high = module.width / columns, module.height / rows
    places = [
        tuple(round(edge) for edge in (column * wide, row * high, (column + 1) * wide, (row + 1) * high))
        for row in range(rows)
        for column in range(columns)
    ]
    server = arguments.url.rstrip("/")
    (model,) = (each["name"] for each in ask(f"{server}/v2/repository/index", {}))
    name = ask(f"{server}/v2/models/{model}")["inputs"][0]["name"]
    pictures = [encoded(module.crop(place)) for place in places]
    entry = {"name": name, "datatype": "BYTES", "shape": [len(pictures)], "data": pictures}
    likeliest = {"name": "probabilities", "parameters": {"classification": 2}}
    (answer,) = ask(f"{server}/v2/models/{model}/infer", {"inputs": [entry], "outputs": [likeliest]})["outputs"]
    values = np.zeros(len(pictures))
    for at, text in enumerate(answer["data"]):
        chance, _, label = text.split(":", 2)
        if label == "defective":
            values[at // 2] = float(chance)
    shown = module.convert("RGB")
    drawing = ImageDraw.Draw(shown)
    for value, (left, top, right, bottom) in zip(values, places, strict=True):
        colour = (round(255 * value), round(255 * (1 - value)), 0)
        drawing.rectangle((left + 6, top + 6, right - 7, bottom - 7), outline=colour, width=8)
        drawing.text((left + 24, top + 20), f"{value:.2f}", fill=colour, font_size=36)
    shown.save(arguments.out)
    print("\n".join(" ".join(f"{value:.2f}" for value in line) for line in values.reshape(rows, columns)))
    truth = arguments.module.with_suffix(".json")
    if truth.exists():
        true = np.array(json.loads(truth.read_text())["defective"]).reshape(-1)
        print(f"{((values > 0.5) == true).sum()} of {len(true)} cells are judged as by people; {arguments.out}")


if __name__ == "__main__":
    main()
