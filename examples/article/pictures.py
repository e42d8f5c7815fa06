"""A folder of pictures to try the script on: Fashion-MNIST, as PNG, one folder for each class."""

import argparse
from pathlib import Path

from PIL import Image

from rushhour.data.fashion import fashion_mnist

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--each", type=int, default=600, help="pictures of each class")
chosen = parser.parse_args()

pictures = fashion_mnist()
classes = pictures.task.classes
written = dict.fromkeys(classes, 0)
for pixels, label in zip(pictures.train.inputs, pictures.train.targets, strict=True):
    name = classes[int(label)]
    if written[name] == chosen.each:
        continue
    file = chosen.folder / name.replace("/", "-") / f"{written[name]:05}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0]).convert("RGB").save(file)
    written[name] += 1
print(f"{sum(written.values())} pictures in {chosen.folder}")
