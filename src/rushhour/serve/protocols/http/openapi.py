"""The server's description of its HTTP interface in OpenAPI 3.1, for the model that it serves now.

Descriptions cover what JSON Schema cannot express: that a tensor's shape and data agree, and that a request may hold
its tensors as raw bytes after the JSON.

Sources: spec.openapis.org/oas/v3.1; kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from rushhour.serve.protocols.control import Control
from rushhour.wire import EMBEDDINGS, HEADER_LENGTH, MAX_TEXTS, ROWS, TEXT, dtype_of

Schema = dict[str, Any]

_OBJECT: Final[Schema] = {"type": "object"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_PARAMETERS: Final[Schema] = {"type": ["object", "null"]}
_FLAG: Final[Schema] = {"type": ["boolean", "null"]}
_STRINGS: Final[Schema] = {"type": "array", "items": {"type": "string"}}
REASONS: Final = {
    400: "The request is not valid, or not for this model.",
    401: "The request has no valid API key.",
    403: "This is switched off, or not allowed for this client.",
    404: "There is no model, version, region or path of this name.",
    409: "The name is in use.",
    413: "The body is larger than the server reads.",
    415: "The body's type or compression is not supported.",
    429: "The server is overloaded; Retry-After says when to try again.",
    431: "The header is larger than the server reads.",
    500: "The engine failed.",
    501: "This is not supported.",
    503: "The server is starting, stopping, or has too many connections.",
}
_ANY_TIME: Final = (400, 401, 431, 503)


def description(control: Control, *, infers: bool = True) -> Schema:
    """The document.

    Args:
        control: of the server.
        infers: whether inference requests are answered at this port.
    """
    entries = control.index()
    names, single = [entry["name"] for entry in entries], len(entries) == 1
    ready = [entry["name"] for entry in entries if entry["state"] == "READY"]
    known = [control.metadata(name) | control.bounds(name) for name in ready]
    # Of several models each has tensors of its own, which are not described here.
    metadata = known[0] if single and known else None
    versions = sorted({entry["version"] or "1" for entry in entries})
    keyed = control.keyed
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Rushhour: {', '.join(names)}",
            "version": control.server()["version"],
            "description": "Open Inference Protocol v2 over HTTP, with Rushhour's extensions.",
        },
        "paths": _paths(infers, metadata, known),
        **({"security": [{"key": []}]} if keyed else {}),
        "components": {
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}),
            "parameters": {
                "model": _path("model", {"type": "string", "enum": names}),
                "version": _path("version", {"type": "string", "enum": versions}),
                "region": _path("region", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"}),
            },
            "schemas": {
                "Error": _object({"error": {"type": "string"}}),
                "OpenAIError": _object({"error": _object({"message": {"type": "string"}, "type": {"type": "string"}})}),
                "InferRequest": _request(metadata),
                "InferResponse": _object(
                    {
                        "model_name": _one_of(names),
                        "model_version": {"type": "string"},
                        "outputs": {"type": "array", "items": _ref("OutputTensor")},
                    },
                    id={"type": "string"},
                    parameters=_object({}, variant={"type": "string"}),
                ),
                "Tensor": _object(_tensor(-1)),
                "OutputTensor": _object(
                    _tensor(0), data={"type": "array"}, parameters=_object({"binary_data_size": _COUNT})
                ),
                "Ready": _object({"ready": {"type": "boolean"}}),
                "Statistics": _object(
                    {
                        "model_stats": {
                            "type": "array",
                            "items": _object(
                                {
                                    "name": {"type": "string"},
                                    "version": {"type": "string"},
                                    "inference_count": _COUNT,
                                    "execution_count": _COUNT,
                                    "inference_stats": _OBJECT,
                                    "batch_stats": {"type": "array"},
                                }
                            ),
                        }
                    }
                ),
            },
        },
    }


def _paths(infers: bool, metadata: Schema | None, models: Sequence[Schema]) -> Schema:
    """The paths.

    Args:
        infers: as of `description`.
        metadata: of the only model; None where there are several, and while it is not loaded.
        models: metadata of those that are loaded.
    """
    of_rows, of_texts = ([model["name"] for model in models if model[what]] for what in ("rows", "embeds"))
    live = _object({"live": {"const": True}})
    tensors = {"type": "array", "items": _ref("Tensor")}
    described = _object(
        {"name": {"type": "string"}, "versions": _STRINGS, "platform": {"type": "string"}},
        inputs=tensors,
        outputs=tensors,
    )
    server = _object({"name": {"const": "rushhour"}, "version": {"type": "string"}, "extensions": _STRINGS})
    index = {
        "type": "array",
        "items": _object({part: {"type": "string"} for part in ("name", "version", "state", "reason")}),
    }
    regions = {"type": "array", "items": _OBJECT}
    paths = {
        "/v2": {"get": _operation("The server's name, version and extensions.", server)},
        "/v2/health/live": {"get": _operation("Whether the server runs.", live) | {"security": []}},
        "/v2/health/ready": {
            "get": _operation("Whether requests are accepted.", _ref("Ready"), unready=True) | {"security": []}
        },
        "/v2/models/stats": {"get": _operation("Statistics of all models.", _ref("Statistics"))},
        "/v2/repository/index": {
            "post": _operation(
                "The models, and whether they are loaded.",
                index,
                413,
                body=_object({}, ready={"type": ["boolean", "null"]}),
            )
        },
        **{
            f"/v2/repository/models/{{model}}/{change}": {
                "parameters": [_parameter("model")],
                "post": _operation(
                    f"{change.capitalize()} the model.",
                    _OBJECT,
                    *(403, 404, 409, 413, 415, 501),
                    body=_object({}, parameters=_PARAMETERS),
                ),
            }
            for change in ("load", "unload")
        },
        "/v2/systemsharedmemory/status": {"get": _operation("The regions of shared memory.", regions)},
        "/v2/systemsharedmemory/unregister": {"post": _operation("Unregister all regions.", _OBJECT, 403, 415)},
        **_of_region(regions),
        "/v2/trace/setting": _settings("tracing"),
        "/v2/logging": _settings("logging"),
        "/config": {"get": _operation("The settings in force.", _OBJECT, 404)},
        "/stats": {"get": _operation("Counters since the start.", _OBJECT)},
        "/metrics": {"get": _operation("Metrics for Prometheus.", None)},
        "/openapi.json": {"get": _operation("This description.", _OBJECT)},
    }
    for version in ("", "/versions/{version}"):
        base = f"/v2/models/{{model}}{version}"
        shared = {"parameters": [_parameter("model"), *([_parameter("version")] if version else [])]}
        paths |= {
            base: {"get": _operation("The model's inputs and outputs.", described, 404)} | shared,
            f"{base}/ready": {"get": _operation("Whether it is ready.", _ref("Ready"), 404, unready=True)} | shared,
            f"{base}/config": {"get": _operation("Its configuration, in Triton's format.", _OBJECT, 404)} | shared,
            f"{base}/stats": {"get": _operation("Its statistics.", _ref("Statistics"), 404)} | shared,
            f"{base}/speed": {"get": _operation("Expected and measured times of its batches.", _OBJECT, 404)} | shared,
            f"{base}/trace/setting": _settings("tracing") | shared,
        }
        if infers:
            paths[f"{base}/infer"] = {"post": _inference(metadata)} | shared
        if infers and of_rows:
            paths[f"{base}/{ROWS}"] = _rows(of_rows) | shared
    if infers and of_texts:
        paths |= _of_openai(of_texts)
    return paths


def _of_region(regions: Schema) -> Schema:
    base = "/v2/systemsharedmemory/region/{region}"
    shared = {"parameters": [_parameter("region")]}
    size = {"type": "integer", "minimum": 1}
    region = _object({"key": {"type": "string"}, "byte_size": size}, offset={"type": ["integer", "null"], "minimum": 0})
    return {
        f"{base}/status": {"get": _operation("This region.", regions, 404, 501)} | shared,
        f"{base}/register": {"post": _operation("Register it.", _OBJECT, 403, 409, 413, 415, 501, body=region)}
        | shared,
        f"{base}/unregister": {"post": _operation("Unregister it.", _OBJECT, 403, 415)} | shared,
    }


def _settings(what: str) -> Schema:
    return {
        "get": _operation(f"The settings of {what}.", _OBJECT, 404),
        "post": _operation(
            f"Change the settings of {what}, where possible.", _OBJECT, 403, 404, 413, 415, 501, body=_OBJECT
        ),
    }


def _inference(metadata: Schema | None) -> Schema:
    content: Schema = {"application/json": {"schema": _ref("InferRequest")}, "application/octet-stream": {}}
    if metadata is not None:
        content["application/json"]["examples"] = {"one": {"value": _example(metadata)}}
    operation = _operation("Answer a request.", _ref("InferResponse"), 404, 413, 415, 429, 500, 501)
    operation["requestBody"] = {"required": True, "content": content}
    operation["parameters"] = [
        {
            "name": HEADER_LENGTH,
            "in": "header",
            "description": "Bytes of the JSON, if raw tensors follow it; 0 if the whole body is one tensor.",
            "schema": _COUNT,
        }
    ]
    operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    operation["responses"]["200"]["headers"] = {
        HEADER_LENGTH: {"description": "Bytes of the JSON, if raw tensors follow it.", "schema": {"type": "integer"}},
        "Server-Timing": {
            "description": "Times of this answer in milliseconds, its batch size, variant and version; may be off.",
            "schema": {"type": "string"},
        },
    }
    return operation


def _rows(names: list[str]) -> Schema:
    """Rows of named values; answers in words."""
    cell = {"type": ["string", "number", "boolean", "null"]}
    row = {"type": "object", "additionalProperties": cell}
    body = _object({"rows": {"type": "array", "items": row, "minItems": 1}}, id={"type": ["string", "null"]})
    body["properties"] |= {"shared": row, "parameters": {"type": ["object", "null"]}}
    answers = {"type": "array", "items": _OBJECT}
    answer = _object(
        {"model_name": _one_of(names), "model_version": {"type": "string"}, "answers": answers},
        id={"type": "string"},
    )
    columns = _object({"columns": {"type": "array", "items": _OBJECT}, "rows": {"type": "array", "items": row}})
    post = _operation("Answer rows of named values, in words.", answer, 404, 413, 415, 429, 500, body=body)
    post["requestBody"]["required"] = True
    return {"get": _operation("The columns of a row, and a few real rows.", columns, 404), "post": post}


def _of_openai(names: list[str]) -> Schema:
    model = _object(
        {"id": _one_of(names), "object": {"const": "model"}, "created": _COUNT}, owned_by={"type": "string"}
    )
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}})
    return {
        EMBEDDINGS: {"post": _embeddings(names)},
        "/v1/models": {"get": _openai_operation("The models, as OpenAI's API lists them.", models, 404)},
    }


def _embeddings(names: list[str]) -> Schema:
    """OpenAI's form: other errors than elsewhere."""
    texts = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_TEXTS}
    body = _object(
        {"model": _one_of(names), "input": {"anyOf": [{"type": "string", "minLength": 1}, texts]}},
        encoding_format={"enum": ["float", "base64", None]},
        dimensions={"type": ["integer", "null"]},
    )
    numbers = {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}
    vector = _object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": numbers})
    usage = _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT})
    answer = _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": vector},
            "model": _one_of(names),
            "usage": usage,
        }
    )
    return _openai_operation("Embed texts, as OpenAI's API does.", answer, 404, 413, 415, 429, 500, 501, body=body)


def _openai_operation(summary: str, answer: Schema, *errors: int, body: Schema | None = None) -> Schema:
    """As `_operation`, with errors in OpenAI's form."""
    operation = _operation(summary, answer, *errors, body=body)
    for status, refusal in operation["responses"].items():
        if status != "200":
            refusal["content"]["application/json"]["schema"] = {"anyOf": [_ref("OpenAIError"), _ref("Error")]}
    return operation


def _request(metadata: Schema | None) -> Schema:
    count = {"type": ["integer", "null"], "minimum": 0}
    wanted = _object(
        {"name": {"type": "string"}},
        parameters={"type": ["object", "null"], "properties": {"binary_data": _FLAG, "classification": count}},
    )
    inputs: Schema = {"type": "array"}
    if metadata is not None:
        each = [_input(tensor, metadata["bounds"][tensor["name"]]) for tensor in metadata["inputs"]]
        inputs |= {"minItems": len(each), "maxItems": len(each), "items": {"anyOf": each}}
        if metadata["texts"]:
            alone = {"type": "array", "minItems": 1, "maxItems": 1, "items": _text()}
            inputs = {"anyOf": [inputs, alone]}
        wanted["properties"]["name"] = {"enum": [tensor["name"] for tensor in metadata["outputs"]]}
    return _object(
        {"inputs": inputs},
        id={"type": ["string", "null"]},
        outputs={"type": ["array", "null"], "items": wanted},
        parameters={
            "type": ["object", "null"],
            "properties": {"binary_data_output": _FLAG, "timeout": count, "priority": count},
        },
    )


def _text() -> Schema:
    """Texts in place of the model's inputs."""
    rows = {"type": "integer", "minimum": 1}
    return _object(
        {
            "name": {"const": TEXT},
            "datatype": {"const": "BYTES"},
            "shape": {"type": "array", "prefixItems": [rows, {"const": 1}], "items": False, "minItems": 1},
        },
        data={"type": "array", "description": "A text for each sample."},
        parameters=_PARAMETERS,
    )


def _input(tensor: Schema, bounds: list[tuple[int, int]]) -> Schema:
    shape: list[Schema] = [{"type": "integer", "minimum": 1}]
    for smallest, largest in bounds:
        bounded = {"type": "integer", "minimum": smallest, "maximum": largest}
        shape.append({"const": largest} if smallest == largest else bounded)
    ranked = {"type": "array", "prefixItems": shape, "items": False, "minItems": len(shape)}
    text = "Flat or nested, as many as the shape says; or the parameter 'binary_data_size', and raw bytes."
    return _object(
        {"name": {"const": tensor["name"]}, "datatype": {"const": tensor["datatype"]}, "shape": ranked},
        data={"type": "array", "description": text},
        parameters=_PARAMETERS,
    )


def _tensor(least: int) -> Schema:
    """The fields of any tensor; its sizes are at least `least`, where -1 is any number of samples."""
    sizes = {"type": "array", "items": {"type": "integer", "minimum": least}}
    return {"name": {"type": "string"}, "datatype": {"type": "string"}, "shape": sizes}


def _example(metadata: Schema) -> Schema:
    """A request for one sample of zeros, the smallest."""
    inputs = []
    for tensor in metadata["inputs"]:
        shape = [1, *(smallest for smallest, _ in metadata["bounds"][tensor["name"]])]
        zeros = np.zeros(shape, dtype_of(tensor["datatype"])).ravel().tolist()
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": zeros})
    return {"inputs": inputs}


def _operation(
    summary: str, answer: Schema | None, *errors: int, body: Schema | None = None, unready: bool = False
) -> Schema:
    """One method of one path; its answer is text if it has no schema."""
    content = {"text/plain": {}} if answer is None else {"application/json": {"schema": answer}}
    operation: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "Success.", "content": content},
            **{str(status): _refusal(status) for status in sorted({*_ANY_TIME, *errors})},
        },
    }
    if unready:
        operation["responses"]["503"]["content"]["application/json"]["schema"] = {
            "anyOf": [_ref("Ready"), _ref("Error")]
        }
    if body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": body}}}
    return operation


def _refusal(status: int) -> Schema:
    return {"description": REASONS[status], "content": {"application/json": {"schema": _ref("Error")}}}


def _object(required: Schema, **optional: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": required | optional}
    return schema | ({"required": list(required)} if required else {})


def _one_of(names: list[str]) -> Schema:
    """The name of a model."""
    return {"const": names[0]} if len(names) == 1 else {"enum": names}


def _path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
