"""The server's own description of what it takes over HTTP, in OpenAPI 3.1: for the model that it serves, as it is now.

What JSON Schema cannot say is said in words: that a tensor's shape and data agree, and that a request may hold its
tensors as raw bytes behind the JSON.

Sources: spec.openapis.org/oas/v3.1; kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rushhour.serve.protocols.control import Control
from rushhour.wire import HEADER_LENGTH, dtype_of

Schema = dict[str, Any]

_OBJECT: Final[Schema] = {"type": "object"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_PARAMETERS: Final[Schema] = {"type": ["object", "null"]}
_FLAG: Final[Schema] = {"type": ["boolean", "null"]}
_STRINGS: Final[Schema] = {"type": "array", "items": {"type": "string"}}
_REASONS: Final = {
    400: "The request is not valid, or not for this model.",
    401: "The request carries no API key that the server knows.",
    403: "This is switched off here.",
    404: "There is nothing of this name.",
    409: "The name is taken.",
    413: "The body is larger than the server reads.",
    415: "The body's type or compression is none that the server reads.",
    429: "More is asked than can be answered in time; Retry-After says when to come back.",
    431: "The header is larger than the server reads.",
    500: "The engine failed.",
    501: "This server does not do that.",
    503: "The server is starting, stopping, or has too many connections.",
}
_ANY_TIME: Final = (400, 401, 431, 503)


def description(control: Control, *, infers: bool = True) -> Schema:
    """The document.

    Args:
        control: of the server.
        infers: whether inference is taken at this port.
    """
    entry = control.index()[0]
    name = entry["name"]
    metadata = control.metadata(name) if entry["state"] == "READY" else None
    version = entry["version"] or "1"
    keyed = control.keyed
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Rushhour: {name}",
            "version": control.server()["version"],
            "description": "Open Inference Protocol v2 over HTTP, and what Rushhour adds to it.",
        },
        "paths": _paths(infers, metadata),
        **({"security": [{"key": []}]} if keyed else {}),
        "components": {
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}),
            "parameters": {
                "model": _path("model", {"type": "string", "enum": [name]}),
                "version": _path("version", {"type": "string", "enum": [version]}),
                "region": _path("region", {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,40}$"}),
            },
            "schemas": {
                "Error": _object({"error": {"type": "string"}}),
                "InferRequest": _request(metadata),
                "InferResponse": _object(
                    {
                        "model_name": {"const": name},
                        "model_version": {"type": "string"},
                        "outputs": {"type": "array", "items": _ref("OutputTensor")},
                    },
                    id={"type": "string"},
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


def _paths(infers: bool, metadata: Schema | None) -> Schema:
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
        "/v2": {"get": _operation("What the server is.", server)},
        "/v2/health/live": {"get": _operation("Whether the server lives.", live) | {"security": []}},
        "/v2/health/ready": {
            "get": _operation("Whether requests are welcome.", _ref("Ready"), unready=True) | {"security": []}
        },
        "/v2/models/stats": {"get": _operation("What each model has done.", _ref("Statistics"))},
        "/v2/repository/index": {
            "post": _operation(
                "The models there are.", index, 413, body=_object({}, ready={"type": ["boolean", "null"]})
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
        "/v2/systemsharedmemory/unregister": {"post": _operation("Forget all regions.", _OBJECT, 403, 415)},
        **_of_region(regions),
        "/v2/trace/setting": _settings("tracing"),
        "/v2/logging": _settings("logging"),
        "/config": {"get": _operation("What is in force.", _OBJECT, 404)},
        "/stats": {"get": _operation("What was done, in numbers.", _OBJECT)},
        "/metrics": {"get": _operation("The same for Prometheus.", None)},
        "/openapi.json": {"get": _operation("This.", _OBJECT)},
    }
    for version in ("", "/versions/{version}"):
        base = f"/v2/models/{{model}}{version}"
        shared = {"parameters": [_parameter("model"), *([_parameter("version")] if version else [])]}
        paths |= {
            base: {"get": _operation("What the model takes and gives.", described, 404)} | shared,
            f"{base}/ready": {"get": _operation("Whether it is ready.", _ref("Ready"), 404, unready=True)} | shared,
            f"{base}/config": {"get": _operation("Its configuration, as Triton's.", _OBJECT, 404)} | shared,
            f"{base}/stats": {"get": _operation("What it has done.", _ref("Statistics"), 404)} | shared,
            f"{base}/speed": {"get": _operation("How fast the host is, by its batches.", _OBJECT, 404)} | shared,
            f"{base}/trace/setting": _settings("tracing") | shared,
        }
        if infers:
            paths[f"{base}/infer"] = {"post": _inference(metadata)} | shared
    return paths


def _of_region(regions: Schema) -> Schema:
    base = "/v2/systemsharedmemory/region/{region}"
    shared = {"parameters": [_parameter("region")]}
    size = {"type": "integer", "minimum": 1}
    region = _object({"key": {"type": "string"}, "byte_size": size}, offset={"type": ["integer", "null"], "minimum": 0})
    return {
        f"{base}/status": {"get": _operation("This region.", regions, 404, 501)} | shared,
        f"{base}/register": {"post": _operation("Open it.", _OBJECT, 403, 409, 413, 415, 501, body=region)} | shared,
        f"{base}/unregister": {"post": _operation("Forget it.", _OBJECT, 403, 415)} | shared,
    }


def _settings(what: str) -> Schema:
    return {
        "get": _operation(f"The settings of {what}.", _OBJECT, 404),
        "post": _operation(f"Change them, where that can be: {what}.", _OBJECT, 403, 404, 413, 415, 501, body=_OBJECT),
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
            "description": "Bytes of the JSON, where raw tensors follow it; 0 where all of the body is one tensor.",
            "schema": _COUNT,
        }
    ]
    operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    operation["responses"]["200"]["headers"] = {
        HEADER_LENGTH: {"description": "Bytes of the JSON, where raw tensors follow it.", "schema": {"type": "integer"}}
    }
    return operation


def _request(metadata: Schema | None) -> Schema:
    count = {"type": ["integer", "null"], "minimum": 0}
    wanted = _object(
        {"name": {"type": "string"}},
        parameters={"type": ["object", "null"], "properties": {"binary_data": _FLAG, "classification": count}},
    )
    inputs: Schema = {"type": "array"}
    if metadata is not None:
        each = [_input(tensor) for tensor in metadata["inputs"]]
        inputs |= {"minItems": len(each), "maxItems": len(each), "items": {"anyOf": each}}
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


def _input(tensor: Schema) -> Schema:
    shape = [{"type": "integer", "minimum": 1}, *({"const": size} for size in tensor["shape"][1:])]
    ranked = {"type": "array", "prefixItems": shape, "items": False, "minItems": len(shape)}
    words = "Flat or nested, as many as the shape says; or 'binary_data_size' among the parameters, and raw bytes."
    return _object(
        {"name": {"const": tensor["name"]}, "datatype": {"const": tensor["datatype"]}, "shape": ranked},
        data={"type": "array", "description": words},
        parameters=_PARAMETERS,
    )


def _tensor(least: int) -> Schema:
    """What is said of any tensor; its sizes are at least so much, -1 being any number of samples."""
    sizes = {"type": "array", "items": {"type": "integer", "minimum": least}}
    return {"name": {"type": "string"}, "datatype": {"type": "string"}, "shape": sizes}


def _example(metadata: Schema) -> Schema:
    """A request for one sample of zeros."""
    inputs = []
    for tensor in metadata["inputs"]:
        shape = [1, *tensor["shape"][1:]]
        zeros = np.zeros(shape, dtype_of(tensor["datatype"])).ravel().tolist()
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": zeros})
    return {"inputs": inputs}


def _operation(
    summary: str, answer: Schema | None, *errors: int, body: Schema | None = None, unready: bool = False
) -> Schema:
    """One method of one path; without an answer's schema it is text."""
    content = {"text/plain": {}} if answer is None else {"application/json": {"schema": answer}}
    operation: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "It is so, or done.", "content": content},
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
    return {"description": _REASONS[status], "content": {"application/json": {"schema": _ref("Error")}}}


def _object(required: Schema, **optional: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": required | optional}
    return schema | ({"required": list(required)} if required else {})


def _path(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
