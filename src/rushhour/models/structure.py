"""The structure of a network, so that a result is not taken for that of another network.

A name (`nets:small`) does not say what it stands for today. Three hashes do: of the operations of a forward pass, of
the code of the factory, and of the initial weights.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from rushhour.bundle import Source
from rushhour.models.source import build, factory_of
from rushhour.models.stale import check_current

_INSTALLED: Final = {"site-packages", "dist-packages"}
_DIGITS: Final = 16
_SAMPLES: Final = 2
_MODULES: Final = 256
_FUNCTIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Structure(msgspec.Struct, frozen=True):
    """What a source's network is, besides its name and arguments.

    Attributes:
        graph: hash of the operations of two passes over samples, as the factory leaves the network and in evaluation:
            which, in which order, on what, with which constants, and what is frozen. Empty where two networks of the
            same source do not agree on it.
        code: module -> hash of its code without comments and docstrings: of the factory's module and of all modules of
            the user that it imports, directly or not. Installed modules are not in here: their versions count.
        weights: hash of parameters and buffers as the factory leaves them. Empty where two networks do not agree on it,
            because the factory draws from other generators than torch's, numpy's and Python's.
    """

    graph: str
    code: dict[str, str]
    weights: str


def structure_of(
    source: Source,
    samples: NDArray[Any],
    prepare: Callable[[Tensor], Tensor],
    *,
    seed: int,
    trusted: tuple[str, ...] = (),
) -> Structure:
    """The structure of the network of a source. It is built twice; no random generator advances.

    Args:
        source: the network.
        samples: of the data, `(n, *shape)`; the first two pass through the network.
        prepare: applied to them first.
        seed: of the weights.
        trusted: factories that may be imported besides those of `rushhour.models`.

    Raises:
        ModelError: if the network cannot be built. That it cannot be run is checked elsewhere.
    """
    columns = [samples[name] for name in samples.dtype.names or ()] or [samples]
    inputs = tuple(torch.from_numpy(np.array(column[:_SAMPLES])) for column in columns)
    if len(inputs) == 1:
        inputs = (prepare(inputs[0]),)
    passes, states = set(), set()
    for _ in range(2):
        with seeded(seed):
            network = build(source, trusted)
            states.add(_state(network))
            passes.add(_passes(network, inputs))
    return Structure(
        graph=passes.pop() if len(passes) == 1 else "",
        code=code_of(source, trusted),
        weights=states.pop() if len(states) == 1 else "",
    )


def code_of(source: Source, trusted: tuple[str, ...] = ()) -> dict[str, str]:
    """Module -> hash of its code; see `Structure.code`.

    Raises:
        ModelError: if the factory may not be imported, or cannot be, or if a file has changed since it was imported.
    """
    factory = inspect.unwrap(factory_of(source, trusted))
    name = source.factory.partition(":")[0]
    roots = {getattr(factory, "__module__", None) or name}
    if not name.startswith("rushhour."):  # packages of rushhour only re-export
        roots.add(name)
    found: dict[str, str] = {}
    pending = sorted(roots)
    while pending:
        module = pending.pop()
        if module in found:
            continue
        file = file_of(module)
        if file is None or not (module in roots or _is_own(module, file)):
            continue
        content = file.read_bytes()
        check_current(module, file, content)
        found[module], imports = _understood(content, module, file.stem == "__init__")
        if _is_own(module, file):
            pending += imports
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=_MODULES)
def _understood(content: bytes, module: str, is_package: bool) -> tuple[str, tuple[str, ...]]:
    """The hash of a module's code, and what it may import. Each key of a store asks for it, and it takes 0.2 s."""
    tree = _parsed(content)
    if tree is None:
        return _hash(content), ()
    imports = tuple(_imports(tree, module, is_package=is_package))
    return _hash(ast.unparse(_bare(tree)).encode()), imports


def file_of(module: str) -> Path | None:
    """The file of a module, found without importing anything; None where it has none."""
    path, spec = None, None
    for depth in range(module.count(".") + 1):
        if depth and path is None:
            return None  # the part above is no package: this is a name in it, not a folder of that name elsewhere
        spec = PathFinder.find_spec(".".join(module.split(".")[: depth + 1]), path)
        if spec is None:
            loaded = getattr(sys.modules.get(module), "__file__", None)  # found by a finder of an editable install
            return Path(loaded) if loaded else None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _is_own(module: str, file: Path) -> bool:
    """Whether it is the user's: neither of the standard library, nor installed, nor of this package."""
    top = module.partition(".")[0]
    return top not in sys.stdlib_module_names and top != "rushhour" and _INSTALLED.isdisjoint(file.parts)


def _parsed(content: bytes) -> ast.Module | None:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):  # a compiled module, or one that is never imported
        return None


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings; comments are gone already."""
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> list[str]:
    """All that a module may import, in functions too; names that are not modules are ignored later."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    return sorted(found - {""})


def _state(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict(keep_vars=True).items():
        digest.update(f"{name} {_content(tensor)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _content(tensor: Any) -> str:
    """A text for a tensor of any kind; for other values their type."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        return type(tensor).__name__
    about = f"{tensor.dtype}{tuple(tensor.shape)}"
    try:
        return about + _hash(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    except RuntimeError:  # sparse, quantised: its bytes lie elsewhere
        return about


def _passes(network: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    trace = _Trace()
    for name, parameter in network.named_parameters():
        trace.note(f"{name} {parameter.requires_grad}")
    with torch.no_grad():
        for turn in ("as built", "in evaluation"):
            trace.note(f"{turn}: {[module.training for module in network.modules()]}")
            trace.begin(network)
            try:
                with warnings.catch_warnings(), trace:
                    warnings.simplefilter("ignore")
                    network(*(each.clone() for each in inputs))
            except Exception as error:  # a user's network may fail in any way
                trace.note(type(error).__name__)
            with contextlib.suppress(Exception):  # its own `train` may fail too
                network.eval()
    return trace.digest()


class _Trace(TorchFunctionMode):
    """Hashes each call of torch: the function, its arguments, and where these came from."""

    def __init__(self) -> None:
        super().__init__()
        self._hash = hashlib.sha256()
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # else a new tensor could get the id of one that was freed

    def begin(self, network: nn.Module) -> None:
        """Drop the tensors of the pass before, and name those that the network holds."""
        self._names, self._kept = {}, []
        kept = network.state_dict().keys()
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            self._name(tensor, name)
            if name not in kept:
                self.note(f"{name} {_content(tensor)}")
        for path, module in network.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    self._name(value, f"{path}.{name}")
                    self.note(f"{path}.{name} {_content(value)}")

    def note(self, text: str) -> None:
        self._hash.update(text.encode())
        self._hash.update(b"\n")

    def digest(self) -> str:
        return self._hash.hexdigest()[:_DIGITS]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = f"{getattr(func, '__qualname__', type(func).__name__)} {_owner(func)}"
        arguments = self._described((args, dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        self.note(f"{called} {arguments} -> {self._described(result)}")
        return result

    def _name(self, tensor: Tensor, name: str) -> str:
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        return name

    def _described(self, value: Any) -> str:
        if isinstance(value, Tensor):
            shape = "lazy" if is_lazy(value) else tuple(value.shape)
            name = self._names.get(id(value)) or self._name(value, f"#{len(self._kept)}")
            return f"{name}:{value.dtype}{shape}"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}={self._described(each)}" for key, each in value.items()) + "}"
        if isinstance(value, tuple | list):
            return "(" + ",".join(map(self._described, value)) + ")"
        if isinstance(value, set | frozenset):
            return "(" + ",".join(sorted(map(self._described, value))) + ")"
        if isinstance(value, float):
            return f"{value:.6g}"  # it may come from data, whose last digits depend on the number of threads
        if isinstance(value, slice):
            return f"{value.start}:{value.stop}:{value.step}"
        if isinstance(value, int | str | torch.dtype | torch.device | torch.layout | torch.memory_format | None):
            return repr(value)
        if isinstance(value, np.ndarray):
            return _hash(np.ascontiguousarray(value).tobytes())
        return type(value).__name__


def _owner(func: Any) -> str:
    """The name of the property whose getter is called."""
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all usual generators, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
