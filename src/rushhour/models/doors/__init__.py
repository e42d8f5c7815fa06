"""What people bring becomes an ONNX graph that answers as it does; `rushhour.models.importing` makes a bundle of that.

door           the Protocol: recognise by content, open without running code that is not trusted
finding        which door takes a path or an object
scaling        what a graph does to its samples first
verification   the graph's answers compared with the original's, each sample alone and among others
onnx_graph     ONNX files and objects
keras          files and models of Keras
saved_model    folders of TensorFlow
torch_module   a torch.nn.Module
torch_program  what torch.export gave, and .pt2 files
"""

from rushhour.models.doors.door import Answers, Arrival, Door, Opening
from rushhour.models.doors.finding import DOORS, Brought, bring, refuse
from rushhour.models.doors.verification import verify_arrival

__all__ = ["DOORS", "Answers", "Arrival", "Brought", "Door", "Opening", "bring", "refuse", "verify_arrival"]
