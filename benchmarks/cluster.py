"""`make bench-cluster`: what a Plan costs beyond one machine, and beside another one.

replicas                part 1: two replicas on Ray against one; what each way to a replica costs; Ray Serve's own
                        @serve.batch
failures                part 2: a server, a replica, a node is killed, an update, more and fewer replicas: requests lost
plan                    part 3: what `rushhour plan` says of one, two and four processes, against their capacity; 8
                        minutes on a quiet machine
neighbours              part 4: two models behind one port, one of which gets ten times what it carries; 3 minutes on a
                        quiet machine
torchrun                part 6: a training on two network namespaces against one machine with two workers; as root
trials                  part 6: recipes and a tuning run on a Ray cluster of two nodes, one of which is killed
openvino, onnxruntime   part 5, with that engine alone: the size of what the container installs, the time from the start
                        of its command until it is ready, its memory beyond that of the engine

The context is what `rushhour export --docker` writes; its own script installs it (.bench/cluster), and its own command
is started from there, by an interpreter that sees no other package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
from bench.machines_apart import machines_apart
from bench.models import bundle_of
from bench.neighbours import neighbours
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Table, verdict
from bench.replicas import failures, replicas
from bench.servers import DidNotStart, free_port
from bench.sizing import sizing
from bench.trial_cluster import trial_cluster

import rushhour
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.plan import PLAN, EngineName, Plan, Policy, Variant
from rushhour.system.machine import cores

RESULTS = Path(__file__).parent / "results" / "cluster.json"
BENCH = Path(__file__).resolve().parent.parent / ".bench"
_ROOT = "/opt/rushhour"
_MB = 1e6
_SIZES = {"openvino": "<= 250", "onnxruntime": "<= 120"}
_LONGEST_START_S = 60.0
_BATCH = 8
_ALONE = {
    "openvino": (
        "import sys; sys.modules['openvino_telemetry'] = None\n"
        "import numpy as np, openvino as ov\n"
        "file, streams, rows, shape = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])\n"
        "core = ov.Core()\n"
        "how = {'NUM_STREAMS': streams, 'INFERENCE_NUM_THREADS': streams, 'INFERENCE_PRECISION_HINT': 'f32'}\n"
        "compiled = core.compile_model(core.read_model(file), 'CPU', how)\n"
        "requests = [compiled.create_infer_request() for _ in range(streams)]\n"
        "for size in (1, rows):\n"
        "    for request in requests:\n"
        "        request.infer([np.zeros((size, *shape), np.uint8)])\n"
    ),
    "onnxruntime": (
        "import os, sys; os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
        "import numpy as np, onnxruntime as ort\n"
        "file, streams, rows, shape = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])\n"
        "options = ort.SessionOptions(); options.intra_op_num_threads = 1\n"
        "session = ort.InferenceSession(file, options, providers=['CPUExecutionProvider'])\n"
        "name = session.get_inputs()[0].name\n"
        "for size in (1, rows):\n"
        "    session.run(None, {name: np.zeros((size, *shape), np.uint8)})\n"
    ),
}
"""The engine by its own API, after a batch of one and one of the largest."""
_READ = "print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])\n"


class Scale(msgspec.Struct, frozen=True):
    """How often the server is started, and the capacities of processes are compared; how often and for how long one
    model is flooded beside another; how often one replica and two are loaded, and for how long each; epochs and
    pictures of a training on two machines; the time of a tuning run on a cluster."""

    starts: int = 9
    rounds: int = 3
    floods: int = 3
    seconds: float = 20.0
    pairs: int = 5
    load_s: float = 8.0
    epochs: int = 3
    pictures: int = 12000
    budget: str = "12m"


class Container:
    """An exported and installed container.

    Attributes:
        place: in place of /opt/rushhour.
        port: that its command listens on.
    """

    def __init__(self, engine: EngineName, bundle: Bundle) -> None:
        work = BENCH / "cluster" / engine
        shutil.rmtree(work, ignore_errors=True)
        run, context, self.place, self.port = work / "run", work / "image", work / "opt", free_port()
        bundle.copy_to(run / "bundles" / "served")
        served = Bundle.open(run / "bundles" / "served")
        self.policy = Policy(streams=cores(), max_batch=_BATCH)
        variant = Variant("served", "bundles/served", served.manifest.hash, engine, "f32")
        Plan(Goal(SLO.parse("p99<50ms")), (variant,), self.policy, model="cnn").save(run / PLAN)
        self.exported = rushhour.export(run, docker=context, port=self.port, memory=2**30)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        install = ["sh", str(context / "install.sh"), str(self.place / "packages")]
        done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DidNotStart((done.stderr.strip().splitlines() or ["pip printed no message"])[-1])
        shutil.copytree(context / "run", self.place / "run")
        text = (context / "Dockerfile").read_text().replace(_ROOT, str(self.place))
        self._environment = dict(re.findall(r"^ENV (\w+)=(.*)$", text, re.MULTILINE))
        (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
        self._command = json.loads(entry)[1:]

    def sizes(self) -> dict[str, int]:
        """Bytes of the files of each installed package, largest first; small ones and metadata together."""
        found: dict[str, int] = {}
        packages = self.place / "packages"
        for file in packages.rglob("*"):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(packages).parts[0].removesuffix(".libs")
                found[name] = found.get(name, 0) + file.stat().st_size
        small = sum(size for size in found.values() if size < _MB)
        shown = {name: size for name, size in found.items() if size >= _MB}
        return dict(sorted(shown.items(), key=lambda item: -item[1])) | {"others": small}

    @contextlib.contextmanager
    def python(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A process of an interpreter with these packages and no others."""
        environment = {"PATH": "/usr/bin:/bin", **self._environment}
        command = [os.path.realpath(sys.executable), *words]
        process = subprocess.Popen(
            command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def start(self) -> tuple[float, float, float]:
        """Start the server; seconds until it is ready, CPU seconds that it has used by then, and its resident bytes."""
        began = time.monotonic()
        with self.python(*self._command) as process:
            while process.poll() is None and time.monotonic() < began + _LONGEST_START_S:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready", timeout=5).close()
                    ready_s = time.monotonic() - began
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                    cpu_s = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
                    return ready_s, cpu_s, 1024 * float(re.findall(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)[0])
                time.sleep(0.005)
        raise DidNotStart("the container's command does not get ready")

    def engine_alone(self, engine: str) -> float:
        """Resident bytes of a process that runs the same graph by the engine's own API."""
        bundle = self.place / "run" / "bundles" / "served"
        shape = repr(Bundle.open(bundle).manifest.signature.inputs[0].shape)
        facts = (str(bundle / "model.onnx"), str(self.policy.streams), str(_BATCH), shape)
        with self.python("-c", _ALONE[engine] + _READ, *facts) as process:
            said, _ = process.communicate(timeout=_LONGEST_START_S)
        return 1024 * float(said)


def container(engine: EngineName, scale: Scale) -> Part:
    """Part 5 with one engine."""
    made = Container(engine, bundle_of("cnn", BENCH / "models"))
    sizes = made.sizes()
    whole = sum(sizes.values()) / _MB
    largest = ", ".join(f"{name} {size / _MB:.0f}" for name, size in list(sizes.items())[:4])
    starts = [made.start() for _ in range(scale.starts + 1)][1:]  # the first reads the files from the disk
    alone = [made.engine_alone(engine) for _ in range(3)]
    ready, cpu_s, held = (statistics.median(each) for each in zip(*starts, strict=True))
    beyond = (held - statistics.median(alone)) / _MB
    say(f"{engine}: {whole:.0f} MB, ready in {ready:.2f} s, {beyond:.0f} MB beyond the engine")
    checks = (
        verdict(
            f"5.size.{engine}",
            f"installed files of a container with {engine} for pictures, over HTTP",
            _SIZES[engine],
            whole,
            None,
            1,
            unit="MB",
            why=f"largest: {largest} MB",
        ),
        verdict(
            f"5.ready.{engine}",
            f"from the start of its command until it is ready, {engine}, median",
            "< 1.5",
            ready,
            None,
            len(starts),
            unit="s",
            why=f"it used {cpu_s:.2f} CPU seconds",
        ),
        verdict(
            f"5.memory.{engine}",
            f"resident memory beyond that of a process that runs the same graph with {engine} alone, median",
            "<= 60",
            beyond,
            None,
            len(starts),
            unit="MB",
        ),
    )
    rows = tuple((engine, name, size / _MB) for name, size in sizes.items())
    requirements = " ".join(made.exported.requirements)
    measured = {"starts": starts, "engine_alone": alone, "requirements": requirements}
    return Part(checks, (Table("What the container installs", ("engine", "package", "MB"), rows),), measured)


def main() -> int:
    """Measure what is missing, and write the record after each part."""
    parser = argparse.ArgumentParser(description="A Plan beyond one machine.")
    names = ",".join(("replicas", "failures", "plan", "neighbours", "torchrun", "trials", *_SIZES))
    parser.add_argument("--only", default="", help=f"of {names}, measured anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the record")
    scale_options(parser, Scale())
    arguments = parser.parse_args()
    scale = scale_of(arguments, Scale)
    return run_parts(
        {
            "replicas": lambda: replicas(scale.pairs, scale.load_s, BENCH / "cluster" / "replicas", BENCH / "models"),
            "failures": lambda: failures(BENCH / "cluster" / "failures", BENCH / "models"),
            "plan": lambda: sizing(scale.rounds, BENCH / "cluster" / "plan", BENCH / "models"),
            "neighbours": lambda: neighbours(
                scale.floods, scale.seconds, BENCH / "cluster" / "neighbours", BENCH / "models"
            ),
            "torchrun": lambda: machines_apart(scale.epochs, scale.pictures, BENCH / "cluster" / "torchrun"),
            "trials": lambda: trial_cluster(scale.pictures, scale.budget, BENCH / "cluster" / "trials"),
            "openvino": lambda: container("openvino", scale),
            "onnxruntime": lambda: container("onnxruntime", scale),
        },
        arguments.out,
        kept=True,
        only={name for name in arguments.only.split(",") if name},
        timed={"replicas", "failures", "plan", "neighbours", "trials", *_SIZES},
        seeds={},
    )


if __name__ == "__main__":
    sys.exit(main())
