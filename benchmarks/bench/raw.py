"""The raw engine, without any server, in a process of its own with the peers' environment (`BENCH_*`).

python raw.py answers SAMPLES.npy OUT.npy       the right answers
python raw.py cost SECONDS SIZE SIZE ...        JSON: for each size, CPU seconds and batches per second
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import bench_model
import numpy as np

_PASSES = 3


def answers(samples: str, out: str) -> None:
    """One batch at a time, each of one sample."""
    model = bench_model.Model()
    pictures = np.load(samples)
    np.save(out, np.concatenate([model.infer(pictures[row : row + 1]) for row in range(len(pictures))]))


def cost(seconds: float, sizes: list[int]) -> dict[str, dict[str, float]]:
    """Batches of each size for so long in all, on as many streams as there are instances. Sizes take turns."""
    import openvino as ov

    file, precision = os.environ["BENCH_MODEL"], os.environ["BENCH_PRECISION"]
    compiled = bench_model.compile_model(file, precision, bench_model.MAX_BATCH, streams=bench_model.INSTANCES)
    sample = [edge.get_length() for edge in list(compiled.input().get_partial_shape())[1:]]
    requests = [compiled.create_infer_request() for _ in range(bench_model.INSTANCES)]
    random = np.random.default_rng(0)
    spent = {size: [0.0, 0.0, 0.0] for size in sizes}
    for turn in range(_PASSES + 1):  # the first one warms up
        for size in sizes:
            for request in requests:
                batch = random.integers(0, 256, (size, *sample), dtype=np.uint8)
                request.set_input_tensor(ov.Tensor(batch))
            wall, cpu = time.perf_counter(), time.process_time()
            batches = _keep_busy(requests, wall + seconds / _PASSES / len(sizes))
            if turn:
                figures = (batches, time.process_time() - cpu, time.perf_counter() - wall)
                spent[size] = [total + figure for total, figure in zip(spent[size], figures, strict=True)]
    return {
        str(size): {"cpu_s": cpu / batches, "batches_per_s": batches / wall}
        for size, (batches, cpu, wall) in spent.items()
    }


def _keep_busy(requests: list[object], until: float) -> int:
    counts = [0] * len(requests)

    def loop(number: int) -> None:
        request = requests[number]
        while True:
            request.start_async()  # type: ignore[attr-defined]
            request.wait()  # type: ignore[attr-defined]
            counts[number] += 1
            if time.perf_counter() >= until:
                return

    others = [threading.Thread(target=loop, args=(number,)) for number in range(1, len(requests))]
    for other in others:
        other.start()
    loop(0)
    for other in others:
        other.join()
    return sum(counts)


if __name__ == "__main__":
    if sys.argv[1] == "answers":
        answers(*sys.argv[2:])
    else:
        print(json.dumps(cost(float(sys.argv[2]), [int(size) for size in sys.argv[3:]])))
