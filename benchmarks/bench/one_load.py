"""`python one_load.py URL RATE SECONDS SEED CORE`: one window of load, and what the generator used for it, as JSON.

Needs `rushhour.load` alone, so that it runs with that of any commit.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from rushhour.load import Generator, OpenJob, Status, discover, payloads, poisson

_WARMUP_S = 0.5


def main(url: str, rate: float, seconds: float, seed: int, core: int) -> None:
    """Print it."""
    target = discover(url)
    warmup = round(rate * _WARMUP_S)
    job = OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(payloads(target)),
        limit_s=0.05,
        timeout_s=10.0,
        outputs=target.outputs,
        schedule=poisson(rate, n=warmup + round(rate * seconds), seed=seed).tobytes(),
        warmup=warmup,
    )
    with Generator({core}) as generator:
        run = generator.run(job)
    measured = run.measured()
    answered = run.status == Status.OK
    lag = measured.sent - measured.scheduled
    said = {
        "requests": len(run),
        "answered": int(answered.sum()),
        # The measured period ends with the last request that is sent, late where the machine was busy.
        "generator_us": 1e6 * run.generator_cpu * float(np.nanmax(measured.taken) - measured.taken[0]) / len(measured),
        "p50_ms": 1e3 * float(np.quantile(measured.latencies(), 0.5)),
        "lag_p50_ms": 1e3 * float(np.nanquantile(lag, 0.5)),
        "lag_p99_ms": 1e3 * float(np.nanquantile(lag, 0.99)),
    }
    print(json.dumps({name: value if np.isfinite(value) else None for name, value in said.items()}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
