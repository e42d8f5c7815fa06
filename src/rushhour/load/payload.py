"""What to send: whole requests, encoded before the clock starts, from samples, files or seeded random values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rushhour.bundle import TensorSpec
from rushhour.errors import LoadError
from rushhour.load.target import Endpoint, Target
from rushhour.wire import HEADER_LENGTH, encode_json_request, encode_request

Payload = bytes
"""A whole request: over HTTP the head and the body, over gRPC the message."""

Encoding = Literal["binary", "json"]

_DISTINCT = 32
"""Requests in rotation: enough that no cache answers for the model, few enough to stay in memory."""
_SMALL_IDS = 100
"""Random values of wide integers lie below this: as token ids or categories they stay inside any vocabulary."""
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
}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OWN_HEADERS = ("content-length", "transfer-encoding", "connection", "expect")


def payloads(
    target: Target,
    samples: Mapping[str, NDArray[Any]] | None = None,
    *,
    rows: int = 1,
    seed: int = 0,
    encoding: Encoding = "binary",
) -> list[Payload]:
    """Whole requests for a model, 32 distinct ones, to be sent in rotation.

    Args:
        target: the model.
        samples: input name -> array of shape `(k, *shape)`, real ones if there are any; None for seeded random
            values in the range of each type.
        rows: samples in one request.
        seed: decides which samples go together, or the random values.
        encoding: tensors as raw bytes or as JSON numbers; gRPC has raw bytes only.

    Raises:
        LoadError: if the samples do not fit the model.
    """
    if rows < 1:
        raise LoadError(f"cannot send requests of {rows} samples", "a request carries at least one", "use --rows 1")
    random = np.random.default_rng(seed)
    if samples is None:
        pool = {spec.name: _random(spec, _DISTINCT * rows, random) for spec in target.signature.inputs}
        chosen = np.arange(_DISTINCT * rows)
    else:
        pool, count = _fitting(target, samples)
        # Whole permutations one after the other: every sample is sent before one is sent twice.
        rounds = -(-_DISTINCT * rows // count)
        chosen = np.concatenate([random.permutation(count) for _ in range(rounds)])[: _DISTINCT * rows]
    return [
        _infer_request(target, {name: array[part] for name, array in pool.items()}, encoding)
        for part in chosen.reshape(_DISTINCT, rows)
    ]


def folder_payloads(target: Endpoint, folder: Path, *, encoding: Encoding = "binary") -> list[Payload]:
    """One request for each file of a folder, in the order of their names.

    For a model (`Target`): `.npy` (the one input), `.npz` (inputs by name) and images (`.jpg`, `.png`; the one input,
    uint8, height x width x channels) become tensors, with or without the axis of rows; `.json` and `.bin` are bodies
    as they are, JSON and the raw rows of the one input. For any other endpoint all files are bodies as they are, to
    be sent by `body_payloads`.

    Raises:
        LoadError: if the folder holds no such file, or one of them cannot be read or does not fit the model.
    """
    if not isinstance(target, Target):
        return [content for _, content in read_bodies(folder)]
    requests = []
    for file in _files(folder):
        if file.suffix.lower() in (".json", ".bin"):
            if target.protocol == "grpc":
                raise _bad_file(file, "gRPC takes tensors, not bodies", "give .npy, .npz, .jpg or .png files")
            is_raw = file.suffix.lower() == ".bin"
            headers = [("Content-Type", _TYPES[file.suffix.lower()]), *([(HEADER_LENGTH, "0")] if is_raw else [])]
            requests.append(http_request(target, "POST", target.infer_path, headers, _content(file)))
            continue
        arrays = _arrays(file, target)
        for spec in target.signature.inputs:
            if spec.name in arrays and arrays[spec.name].shape == spec.shape:
                arrays[spec.name] = arrays[spec.name][None]
        try:
            pool, _ = _fitting(target, arrays)
        except LoadError as error:
            raise _bad_file(file, f"{error.what}: {error.why}", error.fix) from error
        requests.append(_infer_request(target, pool, encoding))
    return requests


def read_bodies(path: Path) -> list[tuple[str, bytes]]:
    """The content type and the bytes of a file, or of each file of a folder in the order of their names.

    Raises:
        LoadError: if there is none, or one cannot be read.
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
        headers: `Name: value` each; they replace what would be sent by default.

    Raises:
        LoadError: if a method, path or header is not HTTP.
    """
    whole = target.prefix + path or "/"
    if not _TOKEN.fullmatch(method) or method in ("HEAD", "CONNECT"):
        raise LoadError(f"cannot use the method {method!r}", "its answers have no body", "write for example POST")
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
        raise LoadError(f"cannot use the header {text!r}", f"{name} is the client's own to set", "leave it out")
    return name, value


def _infer_request(target: Target, inputs: Mapping[str, NDArray[Any]], encoding: Encoding) -> Payload:
    if target.protocol == "grpc":
        from rushhour.load.grpc import encode_grpc_request  # grpcio takes a quarter of a second to import

        return encode_grpc_request(target, inputs)
    if encoding == "json":
        json = encode_json_request(target.signature, inputs)
        return http_request(target, "POST", target.infer_path, [("Content-Type", "application/json")], json)
    header_length, body = encode_request(target.signature, inputs)
    headers = [("Content-Type", "application/octet-stream"), (HEADER_LENGTH, str(header_length))]
    return http_request(target, "POST", target.infer_path, headers, body)


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
            f"up to {_MOST_FILES:,} of {_MOST_BYTES / 2**20:.0f} MiB are kept in memory",
            "choose some of them",
        )
    return files


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _bad_file(file, error.strerror or str(error), "check the path") from error


def _arrays(file: Path, target: Target) -> dict[str, NDArray[Any]]:
    """The tensors in a file: by input name, or for the one input."""
    try:
        if file.suffix.lower() == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if file.suffix.lower() in _IMAGES:
            with Image.open(file) as image:
                array: NDArray[Any] = np.asarray(image)
        else:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _bad_file(file, str(error), "write it anew") from error
    if len(target.signature.inputs) != 1:
        raise _bad_file(file, f"{target.model} has {len(target.signature.inputs)} inputs", "give them by name in .npz")
    only = target.signature.inputs[0]
    if array.ndim == 2 and len(only.shape) == 3 and only.shape[-1] == 1:  # a grey image
        array = array[..., None]
    return {only.name: array}


def _bad_file(file: Path, why: str, fix: str) -> LoadError:
    return LoadError(f"cannot send {file}", why, fix)


def _fitting(target: Target, samples: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], int]:
    """The samples of the model's inputs, and how many there are."""
    pool = {}
    for spec in target.signature.inputs:
        array = samples.get(spec.name)
        if array is None:
            raise LoadError(
                f"the samples lack the input {spec.name!r}",
                f"they hold {', '.join(samples) or 'nothing'}",
                f"give all inputs of {target.model}",
            )
        if array.shape[1:] != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise LoadError(
                f"the samples of {spec.name!r} are {array.dtype} of shape {list(array.shape)}",
                f"{target.model} takes {spec.dtype} of shape {[-1, *spec.shape]}",
                "bring them to that form",
            )
        pool[spec.name] = array
    counts = {len(array) for array in pool.values()}
    if len(counts) != 1 or 0 in counts:
        raise LoadError(
            f"the inputs have {', '.join(map(str, sorted(counts)))} samples",
            "all inputs have the same number, at least one",
            "align them",
        )
    return pool, counts.pop()


def _random(spec: TensorSpec, count: int, random: np.random.Generator) -> NDArray[Any]:
    shape, dtype = (count, *spec.shape), np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.random(shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    high = _SMALL_IDS if dtype.itemsize > 1 else np.iinfo(dtype).max + 1
    return random.integers(0, high, shape).astype(dtype)
