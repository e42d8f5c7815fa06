"""Builds recipes on the nodes of a Ray cluster, for a search on this machine.

A node builds one recipe at a time, in a process of its own. What it made comes back as files, and goes into the
search's store under the key that this machine computes: a bundle that another class of machine, other software, code or
data made has another key, and is refused. A worker or a node that is lost costs the recipe that it was building, which
goes to another node; what no node made is made here, by `apply`.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rushhour.bundle import Bundle
from rushhour.cluster.ray_client import address_of, connect, imported
from rushhour.cluster.trials.node import TrialNode
from rushhour.cluster.trials.packing import Arrays, Facts, Loader, Made, Order, PackedBundle, pack, unpack
from rushhour.compress import Maker, Recipe, Work, first_missing, maker
from rushhour.data import Dataset
from rushhour.errors import BundleError, DataError, GoalError
from rushhour.models import trusted_factories
from rushhour.progress import Progress

AUTO: Final = "auto"
"""The address of the Ray that runs on this machine."""
_START_S: Final = 180.0
"""In which a worker has to start and to import: all CPUs of its node have to be free."""
_LOSSES: Final = 2
"""Of a node's workers, one after another, after which it is not used any more."""
_TRIES: Final = 3
"""Of one recipe, after which it is built here: it may be what kills its process."""
_SETTLE_S: Final = 2.0
"""After which Ray knows whether a worker was lost, or its node."""
_LOOK_S: Final = 1.0


@contextlib.contextmanager
def trial_builder(
    address: str, dataset: Dataset, progress: Progress, *, load: Loader | None = None, model: Bundle | None = None
) -> Iterator[RayBuilder]:
    """A builder on the nodes that can build what this machine would.

    Args:
        address: of the cluster: `HOST:PORT`, or `auto`.
        dataset: that all recipes are built with.
        progress: hears which nodes take part.
        load: reads the data set on a node; None to send its arrays, once.
        model: that the data set is read for, where it is a bundle.

    Raises:
        InstallError: if Ray is not installed.
        GoalError: if no Ray answers, or none of its nodes can build.
        DataError: if no node has the data.
    """
    with _connected(address) as ray, contextlib.ExitStack() as stack:
        given: Arrays | Loader = Arrays.of(dataset) if load is None else load
        progress.start(f"Nodes of the Ray cluster at {address}")
        nodes = [TrialNode(ray, each) for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")]
        for node in nodes:
            stack.callback(node.end, clean=True)
        refused: dict[str, str] = {}
        able = _able(ray, nodes, refused)
        packed = None if model is None else ray.put(pack(model))
        data = (ray.put(given), dataset.name, dataset.content_key, packed)
        ready = _with_data(ray, able, data, refused)
        for node in nodes:
            if node not in ready:
                node.end(clean=True)
        progress.done(f"{len(ready)} of {len(nodes)} build", good=bool(ready))
        for name, why in refused.items():
            progress.note(f"node {name} builds nothing: {why}")
        if not ready:
            why = next(iter(refused.values()), "none of its nodes has CPUs")
            if able:
                fix = "copy it there, at the same path" if load is not None else "free memory and disk there"
                raise DataError(f"no node of the cluster at {address} can use the data {dataset.name}", why, fix)
            raise GoalError(f"no node of the cluster at {address} can build", why, "leave out --cluster to build here")
        yield RayBuilder(ray, ready, dataset)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected. A connection that was there before is used, and stays."""
    ray = imported()
    if ray.is_initialized():
        yield ray
        return
    found = address_of(None if address == AUTO else address)
    if found is None:
        raise GoalError(
            "no Ray runs on this machine",
            "--cluster has no address",
            "write --cluster HOST:PORT, or `ray start --head`",
        )
    connect(ray, found)
    try:
        yield ray
    finally:
        ray.shutdown()


def _able(ray: Any, nodes: Sequence[TrialNode], refused: dict[str, str]) -> list[TrialNode]:
    """The nodes whose workers start, and would make the same bundles as this machine."""
    here, able = maker(), []
    asked = {node.facts(): node for node in nodes}
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_START_S) if asked else ([], [])
    for ref in late:
        refused[asked[ref].name] = f"no worker started within {_START_S:.0f} s: its CPUs are in use, or it is slow"
    for ref in done:
        node = asked[ref]
        try:
            facts: Facts = ray.get(ref)
        except ray.exceptions.RayError as error:
            refused[node.name] = _line(error)
            continue
        if why := _differs(facts.maker, here):
            refused[node.name] = why
        else:
            able.append(node)
    return able


def _with_data(ray: Any, nodes: Sequence[TrialNode], data: tuple[Any, ...], refused: dict[str, str]) -> list[TrialNode]:
    """The nodes that have the data."""
    ready = []
    for node, ref in [(node, node.take(*data)) for node in nodes]:
        if why := _why_not(ray, ref):
            refused[node.name] = why
        else:
            ready.append(node)
    return ready


def _why_not(ray: Any, ref: Any) -> str:
    """Why a node that was given the data builds nothing; empty where it can."""
    try:
        why: str = ray.get(ref)
    except ray.exceptions.RayError as error:
        return _line(error)
    return why


def _differs(there: Maker, here: Maker) -> str:
    """Why a node would make other bundles; empty where it would not."""
    for package, version in here.versions.items():
        if there.versions.get(package) != version:
            return f"it has {package} {there.versions.get(package)}, and this machine {version}"
    if there.features != here.features:
        has, have = " ".join(there.features) or "none", " ".join(here.features) or "none"
        return f"it is of another class of machines (vector extensions {has}, here {have}), and makes other bundles"
    return ""


class RayBuilder:
    """A `rushhour.compress.Builder`.

    Args:
        ray: the module, connected.
        nodes: that have the data set.
        dataset: that all recipes are built with.
    """

    def __init__(self, ray: Any, nodes: Sequence[TrialNode], dataset: Dataset) -> None:
        self._ray = ray
        self._nodes = list(nodes)
        self._returning: dict[Any, TrialNode] = {}
        self._content_key = dataset.content_key
        self._sent: dict[str, Any] = {}

    @property
    def width(self) -> int:
        """See `Builder`: its nodes."""
        return len(self._nodes)

    def build(self, recipes: Sequence[Recipe], work: Work, progress: Progress) -> None:
        """See `Builder`."""
        assert work.dataset.content_key == self._content_key
        queue = deque(recipe for recipe in recipes if first_missing(recipe, work)[1] is not None)
        if not queue:
            return
        count = len(queue)
        progress.start(f"build {count} recipe{'s' * (count > 1)} on {len(self._nodes)} nodes", count)
        wave = _Wave(self._ray, self._nodes, self._returning, self._sent, queue, work, progress)
        try:
            wave.run()
        except BaseException:
            for node in wave.busy:  # else they would compute beside what follows
                node.end(clean=False)
                self._nodes.remove(node)
            progress.done("interrupted", good=False)
            raise
        progress.done(f"{wave.built} built" + f", {count - wave.built} are left to this machine" * (wave.built < count))

    def close(self) -> None:
        """See `Builder`."""
        for node in (*self._nodes, *self._returning.values()):
            node.end(clean=True)
        self._nodes.clear()
        self._returning.clear()


class _Wave:
    """Recipes that are built together.

    Args:
        ray: the module, connected.
        nodes: that build; those that are lost are taken out.
        returning: a reference -> a node whose worker was lost, and which has another: it gets a recipe once that has
            answered, because Ray may take a while to notice that the node itself is gone.
        sent: what the nodes have of bundles.
        queue: the recipes.
        work: what they are applied to.
        progress: receives each step.
    """

    def __init__(
        self,
        ray: Any,
        nodes: list[TrialNode],
        returning: dict[Any, TrialNode],
        sent: dict[str, Any],
        queue: deque[Recipe],
        work: Work,
        progress: Progress,
    ) -> None:
        self._ray = ray
        self._nodes = nodes
        self._returning = returning
        self._sent = sent
        self._queue = queue
        self._work = work
        self._progress = progress
        self._trusted = trusted_factories(work.bundle, work.trusted)
        self._flying: dict[Any, tuple[TrialNode, Recipe]] = {}
        self._losses: dict[str, int] = {}
        self.built = 0

    @property
    def busy(self) -> list[TrialNode]:
        """Nodes that are building."""
        return [node for node, _ in self._flying.values()]

    def run(self) -> None:
        """Until all are built, or no node is left."""
        idle_since = time.monotonic()
        while True:
            for node in self._nodes:
                if self._queue and node not in self.busy:
                    self._begin(node, self._queue.popleft())
            if self._flying:
                idle_since = time.monotonic()
            elif not (self._queue and self._returning) or time.monotonic() - idle_since > _START_S:
                return
            done, _ = self._ray.wait([*self._flying, *self._returning], timeout=_LOOK_S)
            for ref in done:
                if ref in self._returning:
                    self._returned(ref)
                else:
                    self._end(ref)

    def _begin(self, node: TrialNode, recipe: Recipe) -> None:
        known, _ = first_missing(recipe, self._work)
        order = Order(recipe, self._work.seed, self._work.max_drop, self._trusted)
        ref = node.build(order, self._put(self._work.bundle), [self._put(bundle) for bundle in known])
        self._flying[ref] = node, recipe

    def _put(self, bundle: Bundle) -> Any:
        """A reference to the packed bundle, which Ray keeps."""
        key = f"{bundle.path} {bundle.manifest.hash}"
        if key not in self._sent:
            self._sent[key] = self._ray.put(pack(bundle))
        return self._sent[key]

    def _end(self, ref: Any) -> None:
        node, recipe = self._flying.pop(ref)
        try:
            made: Made = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # raised there, and not by what it built
            self._progress.note(f"{recipe} is left to this machine: on node {node.name} {_line(error)}")
            return
        except self._ray.exceptions.RayError as error:
            self._lost(node, recipe, _line(error))
            return
        node.losses = 0
        why = self._kept(recipe, made.bundles) or made.error
        if first_missing(recipe, self._work)[1] is None:
            self.built += 1
            self._progress.advance(1, f"{recipe}: {made.seconds:.0f} s on node {node.name}")
        else:
            self._progress.note(f"{recipe} is left to this machine: on node {node.name} {why}")

    def _kept(self, recipe: Recipe, bundles: Sequence[PackedBundle]) -> str:
        """Put what came into the store, under the keys of this machine; why some of it was refused."""
        arrived = {packed.name: packed for packed in bundles}
        while arrived:
            _, key = first_missing(recipe, self._work)
            path = None if key is None else self._work.store.path(key)
            if path is None or path.name not in arrived:
                return "its bundles have other keys" if path is not None else ""
            try:
                unpack(arrived.pop(path.name), path)
            except BundleError as error:
                return str(error)
        return ""

    def _returned(self, ref: Any) -> None:
        """Another worker of a node can build, or its node is gone, too."""
        node = self._returning.pop(ref)
        if why := _why_not(self._ray, ref):
            node.end(clean=False)
            self._progress.note(f"node {node.name} builds nothing any more: {why}")
        else:
            self._nodes.append(node)

    def _lost(self, node: TrialNode, recipe: Recipe, why: str) -> None:
        lost = self._losses[str(recipe)] = self._losses.get(str(recipe), 0) + 1
        time.sleep(_SETTLE_S)
        self._nodes.remove(node)
        alive = any(each["NodeID"] == node.id and each["Alive"] for each in self._ray.nodes())
        if alive and node.losses + 1 < _LOSSES:
            self._returning[node.lost()] = node
            what = f"the worker on node {node.name} was lost"
        else:
            what = f"node {node.name} was lost"
        is_again = lost < _TRIES and bool(self._nodes or self._returning)
        if is_again:
            self._queue.appendleft(recipe)
        self._progress.note(f"{what}: {recipe} is {'built again' if is_again else 'left to this machine'} ({why})")


def _line(error: BaseException) -> str:
    """The first line of an error of Ray's that says something."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if "Traceback" in str(error) and lines else (lines or [type(error).__name__])[0]
