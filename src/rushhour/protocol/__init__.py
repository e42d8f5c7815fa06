"""The messages of the Open Inference Protocol's gRPC service, for the server and for the client of the load.

The classes are made from `messages.binpb`, which protoc compiles from the `.proto` files beside it (the command stands
in `inference.proto`). No generated Python: that registers its messages in a pool that the whole process shares, where
they clash with those of `tritonclient`, which have the same names; these live in a pool of their own. Nor are
they bound to the version of protobuf that they were compiled with.
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
"""Where a message carries values of each datatype that are not raw: a field of `InferTensorContents`."""

_POOL = _pool()
INFERENCE, HEALTH = (_POOL.FindServiceByName(name) for name in _SERVICES)
"""Descriptors of the services: their methods, and the messages that these take and give."""


def message(name: str) -> Any:
    """The class of a message, by its full name: `inference.ModelInferRequest`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))
