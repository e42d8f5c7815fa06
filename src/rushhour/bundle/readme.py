"""The README in a bundle: what it takes and gives, and how it is opened without Rushhour."""

from __future__ import annotations

import msgspec

from rushhour.bundle.manifest import ANSWERS, MANIFEST, MODEL, SAMPLES, TOKENIZER, WEIGHTS, Manifest
from rushhour.bundle.signature import Signature, TensorSpec

_FEW = 20
_ABOUT = {
    MODEL: "the graph, with its weights: a sample in, an answer out, preprocessing included",
    MANIFEST: "what it takes and gives, what it was made of, its measured accuracy, a hash of each file",
    WEIGHTS: "the weights by their name in the torch module",
    SAMPLES: "a few real samples",
    ANSWERS: "the graph's answers to them",
    TOKENIZER: "makes samples of texts: `tokenizers.Tokenizer.from_file`",
}


def readme_of(manifest: Manifest) -> str:
    """Markdown; its Python runs in the folder of the bundle and needs only NumPy and ONNX Runtime.

    Args:
        manifest: with its files.
    """
    signature, task = manifest.signature, manifest.task
    names = [MODEL, MANIFEST, *(name for name in (WEIGHTS, SAMPLES, ANSWERS, TOKENIZER) if name in manifest.files)]
    files = "\n".join(f"- `{name}`: {_ABOUT[name]}" for name in names)
    inputs = "\n".join(f'    "{each.name}": np.zeros({(1, *each.shape)}, "{each.dtype}"),' for each in signature.inputs)
    means = f"{task.outputs} {'values' if task.kind == 'regression' else 'numbers'}"
    if task.classes:
        shown = ", ".join(task.classes[:_FEW]) + (" ..." if len(task.classes) > _FEW else "")
        places = signature.outputs[0].places
        of_places = {
            "map": f"the class of each pixel: {shown}",
            "tokens": f"the class of each token: {shown}",
            "boxes": f"x1, y1, x2, y2 in pixels, score and class of each box: {shown}",
        }
        means = f"one number for each class: {shown}" if isinstance(places, msgspec.UnsetType) else of_places[places]
    return f"""# {manifest.name}

{_tensors("Takes", signature, signature.inputs)}
{_tensors("Gives", signature, signature.outputs)}

Any number of samples at once; `{signature.outputs[0].name}` is {means}.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])
samples = {{
{inputs}
}}
answers = session.run(None, samples)
```

{files}

With Rushhour: `rushhour serve` this folder; `rushhour.load_module("this folder")` is its torch module, if it has one.
"""


def _tensors(word: str, signature: Signature, specs: tuple[TensorSpec, ...]) -> str:
    listed = ", ".join(f"`{each.name}` {each.dtype} `(n{signature.described(each)[3:-1]})`" for each in specs)
    return f"{word} {listed}."
