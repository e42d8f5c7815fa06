"""Validity: whether generator and machine allow any conclusion about the server from a window."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load.generator.job import MAX_CONNECTIONS
from rushhour.load.generator.samples import Samples
from rushhour.system.machine import open_files

_MAX_CANARY = 0.10
_MAX_SEND_DELAY = 0.05
_MAX_STEAL = 0.05
_MAX_GENERATOR_CPU = 0.70
_NULL_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Threats:
    """Threats to the validity of a window; each is empty where there is none.

    Attributes:
        generator: it was at its limit.
        noise: the machine was disturbed.
        delay: requests were sent late.
    """

    generator: str
    noise: str
    delay: str

    def __bool__(self) -> bool:
        return bool(self.generator or self.noise or self.delay)


def threats_to(measured: Samples, slo: SLO, rate_rps: float, null_rps: float | None) -> Threats:
    """The threats to the validity of a window.

    Args:
        measured: its samples, without the warm-up.
        slo: the SLO.
        rate_rps: of the window.
        null_rps: the generator's throughput against the null server; None where it is not known.
    """
    generator = noise = delay = ""
    if measured.starved:
        generator = (
            f"the generator's bound of {measured.connections:,} connections was reached: {measured.starved:,} requests "
            f"waited for a connection{file_limit_hint()}"
        )
    elif measured.generator_cpu > _MAX_GENERATOR_CPU:
        generator = f"the generator used {measured.generator_cpu:.0%} of a core, over {_MAX_GENERATOR_CPU:.0%}"
    elif null_rps is not None and rate_rps > _NULL_SHARE * null_rps:
        generator = (
            f"the generator sends {null_rps:,.0f} requests/s to a null server, "
            f"less than twice the rate of this window ({rate_rps:,.0f}/s)"
        )
    if measured.canary_p99_s > _MAX_CANARY * slo.limit_s:
        noise = (
            f"the machine was disturbed: short sleeps took up to {measured.canary_p99_s * 1e3:.1f} ms longer (p99), "
            f"over {_MAX_CANARY:.0%} of the limit"
        )
    elif measured.steal > _MAX_STEAL:
        noise = (
            f"the machine was disturbed: {measured.steal:.0%} of the time was stolen by its hypervisor, "
            "or spent waiting for memory or disk"
        )
    send_delay = quantile(measured.sent - measured.scheduled, 0.99)
    if send_delay > _MAX_SEND_DELAY * slo.limit_s:
        delay = (
            f"requests were sent up to {send_delay * 1e3:.1f} ms late (p99), over {_MAX_SEND_DELAY:.0%} of the limit"
        )
    return Threats(generator, noise, delay)


def file_limit_hint() -> str:
    """Why the bound on connections is lower than usual, and the remedy; empty where it is not."""
    files, _ = open_files(MAX_CONNECTIONS)
    return f". It may open only {files} files: raise the limit (ulimit -n)" if files < MAX_CONNECTIONS else ""


def quantile(seconds: NDArray[np.float64], q: float) -> float:
    """A quantile of the times that are known; 0 where none is."""
    known = seconds[~np.isnan(seconds)]
    return float(np.quantile(known, q)) if len(known) else 0.0
