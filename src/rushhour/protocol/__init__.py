"""The messages of the Open Inference Protocol's gRPC service, for the server and for the load generator.

The classes are created from `messages.binpb`, which protoc compiles from the `.proto` files beside it (the command is
in `inference.proto`). Generated Python would register its messages in the pool of the whole process, where they collide
with those of `tritonclient`, which have the same names; these have a pool of their own. And they do not depend on the
version of protobuf that compiled them.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_SERVICES = ("inference.GRPCInferenceService", "grpc.health.v1.Health")


def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    compiled = resources.files(__package__).joinpath("messages.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of `InferTensorContents` that holds the values of each datatype, where they are not raw."""

_POOL = _pool()
INFERENCE, HEALTH = (_POOL.FindServiceByName(name) for name in _SERVICES)
"""Descriptors of the services: their methods, and their requests and responses."""


def message(name: str) -> Any:
    """The class of a message, by its full name: `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))
