"""An ONNX graph becomes a torch network that can be trained, pruned, factorised, distilled and exported again.

    reading        the file, without trust                       -> a checked ModelProto
    conversion     operator by operator (operators/, patterns)   -> a `Program` with its weights
    program        layers, constants and calls as data           -> a torch.fx.GraphModule
    input_layout   pictures with channels last            -> the network for channels first
    verification   answers compared with ONNX Runtime's

A program is data: a bundle carries it as the arguments of its source, and building it runs only torch's layers and the
functions of `functions`.
"""

from rushhour.models.converted.conversion import Converted, NotTrainable, convert
from rushhour.models.converted.input_layout import channels_first
from rushhour.models.converted.program import Program, converted, network_of
from rushhour.models.converted.reading import MOST_NODES, checked_onnx, read_onnx
from rushhour.models.converted.verification import verify

__all__ = [
    "MOST_NODES",
    "Converted",
    "NotTrainable",
    "Program",
    "channels_first",
    "checked_onnx",
    "convert",
    "converted",
    "network_of",
    "read_onnx",
    "verify",
]
