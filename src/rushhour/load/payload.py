"""Payloads: whole requests, encoded before the load starts, from samples, files or seeded random values."""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rushhour.bundle import Signature, cut, own_sizes
from rushhour.errors import LoadError, WireError
from rushhour.load.target import DeclaredInput, Endpoint, Target
from rushhour.wire import HEADER_LENGTH, Content, dtype_of, encode_json_tensors, encode_tensors

Payload = bytes
"""A whole request: over HTTP the head and the body, over gRPC the message."""

Encoding = Literal["binary", "json"]

_DISTINCT = 32
"""Requests in rotation: enough that no cache answers in place of the model, few enough to stay in memory."""
_SMALL_IDS = 100
"""Random values of wide integers are below this: as token ids or categories they are inside any vocabulary."""
_WORD_BYTES = 16
"""Of a random element of a BYTES tensor."""
_MOST_FILES = 1000
_MOST_BYTES = 512 * 2**20
_IMAGES = (".jpg", ".jpeg", ".png")
_TYPES = {
    ".bin": "application/octet-stream",
    ".npy": "application/octet-stream",
    ".npz": "application/octet-stream",
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".txt": "text/plain",
}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OWN_HEADERS = ("content-length", "transfer-encoding", "connection", "expect")
_UNREADABLE = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, SyntaxError, struct.error, zlib.error),
    *(zipfile.BadZipFile, Image.DecompressionBombError),
)
"""What numpy and Pillow raise for damaged files. Pillow reports some damage as a `SyntaxError`."""


def payloads(
    target: Target,
    samples: Mapping[str, NDArray[Any]] | None = None,
    *,
    rows: int = 1,
    seed: int = 0,
    encoding: Encoding = "binary",
    signature: Signature | None = None,
    distinct: int = _DISTINCT,
) -> list[Payload]:
    """Whole requests for a model, distinct ones, to be sent in rotation; fewer where random values are large.

    Args:
        target: the model.
        samples: input name -> array of shape `(k, *shape)`; None for seeded random values in the range of each type,
            and words for BYTES.
        rows: samples in one request. A model without a batch axis takes one.
        seed: of the choice of samples, or of the random values.
        encoding: tensors as raw bytes or as JSON; gRPC has raw bytes only.
        signature: of a model with open dimensions, in which the samples are padded: each request has the size of its
            longest sample.
        distinct: requests made of `samples`.

    Raises:
        LoadError: if the samples do not fit the model, or its server does not declare its inputs.
    """
    if rows < 1:
        raise LoadError(f"cannot send requests of {rows} samples", "a request carries at least one", "use --rows 1")
    inputs = target.interface.inputs
    if rows > 1 and inputs and not any(each.takes_rows or each.shape is None for each in inputs):
        raise LoadError(
            f"cannot send requests of {rows} samples",
            f"{target.model} has no batch axis: it takes {', '.join(map(str, inputs))}",
            "leave out --rows",
        )
    random = np.random.default_rng(seed)
    if samples is None:
        shapes = _shapes(target, rows)
        return [
            _infer_request(target, [(each, _random(each, shape, random)) for each, shape in shapes], encoding)
            for _ in range(_distinct(shapes))
        ]
    pool = _fitting(target, samples)
    counts = {len(array) for _, array in pool}
    if len(counts) != 1 or 0 in counts:
        raise LoadError(
            f"the inputs have {', '.join(map(str, sorted(counts)))} samples",
            "all inputs have the same number, at least one",
            "align them",
        )
    count = counts.pop()
    # Whole permutations one after the other: each sample is sent once before any is sent twice.
    rounds = -(-distinct * rows // count)
    chosen = np.concatenate([random.permutation(count) for _ in range(rounds)])[: distinct * rows]
    return [
        _infer_request(target, _cut([(declared, array[part]) for declared, array in pool], signature), encoding)
        for part in chosen.reshape(distinct, rows)
    ]


def row_payloads(target: Target, *, rows: int = 1, seed: int = 0) -> list[Payload]:
    """Requests of the real rows that a server of Rushhour has, by their columns' names, to be sent in rotation.

    Args:
        target: the model.
        rows: in one request.
        seed: of their choice.

    Raises:
        LoadError: if the model takes no rows.
    """
    if target.protocol == "grpc":
        raise LoadError("cannot send named rows over gRPC", "they are JSON over HTTP", "give an http:// URL")
    own, random = target.sample_rows(), np.random.default_rng(seed)
    requests = []
    for _ in range(_DISTINCT):
        chosen = [own[place] for place in random.choice(len(own), rows, replace=rows > len(own))]
        body = msgspec.json.encode({"rows": chosen})
        requests.append(http_request(target, "POST", target.rows_path, [("Content-Type", "application/json")], body))
    return requests


def _cut(
    pool: list[tuple[DeclaredInput, NDArray[Any]]], signature: Signature | None
) -> list[tuple[DeclaredInput, NDArray[Any]]]:
    """The tensors of one request without the padding behind its longest sample."""
    if signature is None or not signature.dimensions:
        return pool
    arrays = {declared.name: array for declared, array in pool}
    sizes = tuple(map(max, zip(*own_sizes(signature, arrays), strict=True)))
    shorter = cut(signature, arrays, sizes)
    return [(declared, shorter[declared.name]) for declared, _ in pool]


def folder_payloads(target: Endpoint, folder: Path, *, encoding: Encoding = "binary") -> list[Payload]:
    """One request for each file of a folder, in the order of their names.

    For a model (`Target`): `.npy` (the only input), `.npz` (inputs by name) and images (`.jpg`, `.png`; the only input,
    uint8, height x width x channels) become tensors, with or without a batch axis; images and `.txt` are sent unchanged
    where the only input is BYTES; `.json` and `.bin` are bodies, sent unchanged: JSON, and the raw rows of the only
    input. For any other endpoint all files are bodies, to be sent by `body_payloads`.

    Raises:
        LoadError: if the folder holds no such file, or one of them cannot be read or does not fit the model.
    """
    if not isinstance(target, Target):
        return [content for _, content in read_bodies(folder)]
    requests = []
    for file in _files(folder):
        if file.suffix.lower() in (".json", ".bin"):
            if target.protocol == "grpc":
                raise _bad_file(file, "gRPC takes tensors, not bodies", "use .npy, .npz, .jpg or .png files")
            is_raw = file.suffix.lower() == ".bin"
            headers = [("Content-Type", _TYPES[file.suffix.lower()]), *([(HEADER_LENGTH, "0")] if is_raw else [])]
            requests.append(http_request(target, "POST", target.infer_path, headers, _content(file)))
            continue
        arrays = _arrays(file, target)
        try:
            requests.append(_infer_request(target, _fitting(target, arrays), encoding))
        except LoadError as error:
            raise _bad_file(file, f"{error.what}: {error.why}", error.fix) from error
    return requests


def read_bodies(path: Path) -> list[tuple[str, bytes]]:
    """The content type and the bytes of a file, or of each file of a folder in the order of their names.

    Raises:
        LoadError: if there is no file, or one cannot be read.
    """
    files = _files(path) if path.is_dir() else [path]
    return [(_TYPES.get(file.suffix.lower(), "application/octet-stream"), _content(file)) for file in files]


def body_payloads(
    target: Endpoint,
    bodies: Sequence[tuple[str, bytes]],
    *,
    method: str = "POST",
    path: str = "",
    headers: Sequence[str] = (),
) -> list[Payload]:
    """Whole HTTP requests for any endpoint.

    Args:
        target: from `endpoint`.
        bodies: content type and bytes of each; empty for one request without a body.
        method: of all of them.
        path: behind the URL's own, with the query if there is one.
        headers: `Name: value` each; they replace the defaults.

    Raises:
        LoadError: if a method, path or header is not HTTP.
    """
    whole = target.prefix + path or "/"
    if not _TOKEN.fullmatch(method) or method in ("HEAD", "CONNECT"):
        raise LoadError(
            f"cannot use the method {method!r}",
            "it is not an HTTP method whose answers have a body",
            "write for example POST",
        )
    if not (whole.startswith("/") and whole.isascii() and whole.isprintable() and " " not in whole):
        raise LoadError(f"cannot use the path {path!r}", "a path begins with / and holds no space", "quote it with %20")
    given = [_header(text) for text in headers]
    named = {name.lower() for name, _ in given}
    requests = []
    for content_type, body in bodies or [("", b"")]:
        default = [("Content-Type", content_type)] if content_type and "content-type" not in named else []
        requests.append(http_request(target, method, whole, [*default, *given], body))
    return requests


def http_request(target: Endpoint, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes) -> Payload:
    """A whole HTTP/1.1 request."""
    named = {name.lower() for name, _ in headers}
    lines = [f"{method} {path} HTTP/1.1"]
    if "host" not in named:
        lines.append(f"Host: {target.authority}")
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    name, value = name.strip(), value.strip()
    printable = all(letter.isprintable() or letter == "\t" for letter in value)
    if not (colon and _TOKEN.fullmatch(name) and printable and all(ord(letter) < 256 for letter in value)):
        raise LoadError(f"cannot use the header {text!r}", "it is not of the form 'Name: value'", "check --header")
    if name.lower() in _OWN_HEADERS:
        raise LoadError(f"cannot use the header {text!r}", f"the client sets {name} itself", "leave it out")
    return name, value


def _infer_request(
    target: Target, tensors: Sequence[tuple[DeclaredInput, NDArray[Any]]], encoding: Encoding
) -> Payload:
    contents = [_fitted(target, declared, array) for declared, array in tensors]
    if target.protocol == "grpc":
        from rushhour.load.generator.grpc_codec import encode_grpc_request  # protobuf is needed for gRPC alone

        return encode_grpc_request(target.model, contents)
    if encoding == "json":
        try:
            json = encode_json_tensors(contents)
        except WireError as error:
            raise LoadError(error.what, error.why, "leave out --json-tensors") from error
        return http_request(target, "POST", target.infer_path, [("Content-Type", "application/json")], json)
    header_length, body = encode_tensors(contents)
    headers = [("Content-Type", "application/octet-stream"), (HEADER_LENGTH, str(header_length))]
    return http_request(target, "POST", target.infer_path, headers, body)


def _fitted(target: Target, declared: DeclaredInput, array: NDArray[Any]) -> Content:
    fitted = declared.fitted(array)
    if fitted is None:
        raise _misfit(target, declared, array)
    if declared.datatype == "BYTES":
        elements = [each.encode() if isinstance(each, str) else bytes(each) for each in fitted.flat]
        fitted = np.fromiter(elements, object, len(elements)).reshape(fitted.shape)
    return Content(declared.name, declared.datatype, fitted)


def _misfit(target: Target, declared: DeclaredInput, array: NDArray[Any]) -> LoadError:
    return LoadError(
        f"the samples of {declared.name!r} are {array.dtype} of shape {list(array.shape)}",
        f"{target.model} takes {declared}",
        "convert them to that type and shape",
    )


def _files(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _TYPES and file.is_file())
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise LoadError(f"cannot read the folder {folder}", error.strerror or str(error), "check the path") from error
    if not files:
        raise LoadError(
            f"{folder} holds no payload", f"payloads are {', '.join(_TYPES)} files", "put at least one there"
        )
    if len(files) > _MOST_FILES or size > _MOST_BYTES:
        raise LoadError(
            f"{folder} holds {len(files):,} payloads of {size / 2**20:,.0f} MiB",
            f"the limits are {_MOST_FILES:,} payloads and {_MOST_BYTES / 2**20:.0f} MiB, as all are kept in memory",
            "use a part of them",
        )
    return files


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _bad_file(file, error.strerror or str(error), "check the path") from error


def _arrays(file: Path, target: Target) -> dict[str, NDArray[Any]]:
    """The tensors in a file: by input name, or for the only input."""
    inputs, kind = target.interface.inputs, file.suffix.lower()
    only = inputs[0] if len(inputs) == 1 else None
    is_element = only is not None and only.datatype == "BYTES" and (kind in _IMAGES or kind == ".txt")
    if is_element or kind == ".txt":
        if only is None or not is_element:
            raise _bad_file(file, f"{target.model} does not take one BYTES tensor", "use .npy or .npz files")
        return {only.name: _element(file, only)}
    try:
        if kind == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if kind in _IMAGES:
            with Image.open(file) as image:
                array: NDArray[Any] = np.asarray(image)
        else:
            array = np.load(file, allow_pickle=False)
    except _UNREADABLE as error:
        raise _bad_file(
            file, str(error) or type(error).__name__, "check that it is a valid file of that type"
        ) from error
    if only is None:
        how_many = f"has {len(inputs)} inputs" if inputs else "declares no input"
        raise _bad_file(file, f"{target.model} {how_many}", "give them by name in .npz")
    if array.ndim == 2 and only.fitted(array) is None:  # a grey image
        array = array[..., None]
    return {only.name: array}


def _element(file: Path, only: DeclaredInput) -> NDArray[Any]:
    """A file as the only element of a BYTES tensor."""
    shape = only.shape or (1,)
    if not set(shape) <= {-1, 1}:
        raise _bad_file(file, f"{only.name!r} takes {only}", "use .npy files of that shape")
    return np.fromiter([_content(file)], object, 1).reshape([1] * len(shape))


def _bad_file(file: Path, why: str, fix: str) -> LoadError:
    return LoadError(f"cannot send {file}", why, fix)


def _fitting(target: Target, samples: Mapping[str, NDArray[Any]]) -> list[tuple[DeclaredInput, NDArray[Any]]]:
    """The model's inputs with their samples, of the right types. Where it declares no input, those of the samples."""
    found = []
    inputs = target.interface.inputs or [DeclaredInput(name, "", None) for name in samples]
    for declared in inputs:
        array = samples.get(declared.name)
        if array is None:
            raise LoadError(
                f"the samples lack the input {declared.name!r}",
                f"they have {', '.join(samples) or 'none'}",
                f"give all inputs of {target.model}",
            )
        declared = declared.typed(array.dtype)
        if not declared.takes(array.dtype):
            raise _misfit(target, declared, array)
        found.append((declared, array))
    return found


def _shapes(target: Target, rows: int) -> list[tuple[DeclaredInput, tuple[int, ...]]]:
    """The model's inputs with the shapes of a request's tensors.

    Raises:
        LoadError: if the server does not declare them.
    """
    if not target.interface.inputs:
        raise LoadError(
            f"cannot make samples for {target.model}",
            "the server's metadata names no input",
            "name them with --shape NAME:FP32:SIZE,SIZE, or send .json or .npz files with --payloads",
        )
    shapes = []
    for each in target.interface.inputs:
        if each.datatype and not each.is_known:
            raise LoadError(
                f"cannot make samples of the input {each.name!r}",
                f"the server declares it as {each}, an unknown datatype",
                "send .json files with --payloads",
            )
        shape = each.whole(rows)
        if shape is None or not each.datatype:
            open_type = "" if each.datatype else "FP32:"
            sizes = open_type + ",".join(
                "SIZE" if size < 0 else str(size) for size in (each.shape or (-1, -1))[each.takes_rows :]
            )
            raise LoadError(
                f"cannot make samples of the input {each.name!r}",
                f"the server declares it as {each}, which leaves a size or the datatype open",
                f"set it with --shape {each.name}:{sizes}, or send files with --payloads",
            )
        shapes.append((each, shape))
    return shapes


def _distinct(shapes: Sequence[tuple[DeclaredInput, tuple[int, ...]]]) -> int:
    """The number of requests of these shapes that are kept in memory."""
    size = sum(math.prod(shape) * each.value_bytes for each, shape in shapes)
    if size > _MOST_BYTES:
        raise LoadError(
            f"a request has {size / 2**20:,.0f} MiB",
            f"up to {_MOST_BYTES / 2**20:.0f} MiB are kept in memory",
            "make it smaller with --shape or --rows",
        )
    return max(1, min(_DISTINCT, _MOST_BYTES // max(1, size)))


def _random(declared: DeclaredInput, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[Any]:
    if declared.datatype == "BYTES":
        letters = random.integers(ord("a"), ord("z") + 1, (math.prod(shape), _WORD_BYTES), np.uint8)
        return np.fromiter([word.tobytes() for word in letters], object, len(letters)).reshape(shape)
    dtype: np.dtype[Any] = np.dtype(np.float32) if declared.datatype == "BF16" else dtype_of(declared.datatype)
    if dtype.kind == "f":
        return random.random(shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    high = _SMALL_IDS if dtype.itemsize > 1 else np.iinfo(dtype).max + 1
    return random.integers(0, high, shape).astype(dtype)
