"""A network that takes pictures with channels last and moves them first at once, without that move.

Whoever feeds it moves them then: as bytes, before they are scaled, which is faster, and as every other network is fed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import msgspec

from rushhour.models.converted.conversion import Converted
from rushhour.models.converted.program import Ref

_TO_FIRST: Final = [0, 3, 1, 2]


def channels_first(converted: Converted) -> Converted | None:
    """The same network for `(n, channels, height, width)`; None where it does not begin with that move.

    Args:
        converted: of one input.
    """
    program = converted.program
    if len(program.inputs) != 1 or program.output.name in program.inputs:
        return None
    given = Ref(program.inputs[0])
    users = [call for call in program.calls if given in _refs(call.arguments) and call.what != "batch_size"]
    if len(users) != 1 or users[0].what != "permute" or list(users[0].arguments[1]) != _TO_FIRST:
        return None
    moved = Ref(users[0].name)

    def without(argument: Any) -> Any:
        if isinstance(argument, list):
            return [without(each) for each in argument]
        return given if argument == moved else argument

    calls = tuple(
        msgspec.structs.replace(call, arguments=without(list(call.arguments)))
        for call in program.calls
        if call is not users[0]
    )
    if program.output == moved:
        return None
    return dataclasses.replace(
        converted,
        program=msgspec.structs.replace(program, calls=calls),
        tensors={result: tensor for result, tensor in converted.tensors.items() if result != moved.name},
    )


def _refs(arguments: Any) -> list[Ref]:
    if isinstance(arguments, Ref):
        return [arguments]
    if isinstance(arguments, list | tuple):
        return [ref for each in arguments for ref in _refs(each)]
    return []
