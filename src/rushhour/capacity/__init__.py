"""The capacity of a server, predicted from service times: one model for the offline tuner and the online controller.

ServiceProfile        seconds of a batch, and how they vary
cascade_times         those of two engines, the second of which gets a share of each batch
Overhead              what serving takes from the engine
Traffic               when requests arrive
Scenario              a policy on an engine
simulate              the latencies of one scenario, one batch after another
late_shares           late requests of many scenarios at once
capacities            the capacities of many scenarios at once
predicted_capacity    that of one
best_batch            the batch bound to serve with
smallest_bound        the same, of capacities that are known
explained_overhead    what a request costs beside the engine, from a capacity that was measured
steady_share          what a host of varying speed leaves of a capacity
usual_bounds          of the sizes of samples that differ: to the next one they are padded
best_bounds           the same, for known samples
padding_share         of what is computed then
"""

from rushhour.capacity.bounds import best_bounds, padding_share, usual_bounds
from rushhour.capacity.cascade import cascade_times
from rushhour.capacity.lockstep import late_shares
from rushhour.capacity.overhead import Overhead, Saturation
from rushhour.capacity.profile import ServiceProfile
from rushhour.capacity.scenario import Scenario
from rushhour.capacity.search import best_batch, capacities, explained_overhead, predicted_capacity, smallest_bound
from rushhour.capacity.simulation import simulate
from rushhour.capacity.traffic import Traffic
from rushhour.capacity.waves import steady_share

__all__ = [
    "Overhead",
    "Saturation",
    "Scenario",
    "ServiceProfile",
    "Traffic",
    "best_batch",
    "best_bounds",
    "capacities",
    "cascade_times",
    "explained_overhead",
    "late_shares",
    "padding_share",
    "predicted_capacity",
    "simulate",
    "smallest_bound",
    "steady_share",
    "usual_bounds",
]
