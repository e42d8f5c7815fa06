"""The public names of `rushhour`: cheap to import, in any order, callable, and documented."""

from __future__ import annotations

import inspect
import itertools
import pydoc
import subprocess
import sys
from typing import Any

import click
import pytest

import rushhour
from rushhour import api
from rushhour.cli import cli

VERBS = ("train", "compress", "tune", "serve", "load", "compare", "report", "export", "deploy", "size", "import_model")
PACKAGES = tuple(verb for verb in VERBS if verb not in ("compare", "export", "deploy", "size", "import_model"))
COMMANDS = {verb: verb for verb in VERBS} | {"import_model": "import", "size": "plan"}
"""`rushhour.plan` is the module of the Plan."""
CLI_ONLY = {"demo", "machine"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_exported_is_there() -> None:
    assert set(VERBS) < set(rushhour.__all__) <= set(dir(rushhour))
    for name in rushhour.__all__:
        assert getattr(rushhour, name) is not None
    for name in api.__all__:
        assert getattr(api, name) is not None
    assert rushhour.__all__ == sorted(
        rushhour.__all__, key=lambda name: (name.upper() != name, not name[0].isupper(), name)
    )
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = rushhour.trian


def test_import_is_cheap() -> None:
    code = (
        "import sys, rushhour;"
        "print([n for n in ('torch', 'numpy', 'openvino', 'click', 'rushhour.api') if n in sys.modules])"
    )
    assert python(code) == "[]"


def test_the_api_loads_no_torch() -> None:
    assert python("import sys, rushhour.api; print('torch' in sys.modules)") == "False"


IMPORTS = (
    "import rushhour; first = rushhour.{verb}",
    "from rushhour import {verb} as second",
    "import rushhour.{verb}.{submodule} as submodule",
    "from rushhour.api import {verb} as function",
)
CHECKS = """
import inspect, importlib, sys
package = sys.modules["rushhour.{verb}"]
assert rushhour.{verb} is first is second is package
assert rushhour.{verb}.{submodule} is submodule is sys.modules["rushhour.{verb}.{submodule}"]
assert callable(package) and inspect.ismodule(package)
assert inspect.signature(package) == inspect.signature(function)
"""
SUBMODULES = {"load": "arrivals", "serve": "settings", "report": "wording", "train": "settings"}
ORDERS = {
    "load": itertools.permutations(IMPORTS),
    "serve": [IMPORTS, IMPORTS[::-1]],
    "report": [IMPORTS, IMPORTS[::-1]],
    "train": [IMPORTS],
}


@pytest.mark.parametrize("verb", [pytest.param("load", marks=pytest.mark.slow), "serve", "report", "train"])
def test_a_verb_is_a_function_and_a_package_whatever_is_imported_first(verb: str) -> None:
    """Each order in a process of its own, forked before anything of Rushhour is imported."""
    names = {"verb": verb, "submodule": SUBMODULES[verb]}
    programs = []
    for order in ORDERS[verb]:
        rest = [line for line in IMPORTS if line not in order]
        programs.append("\n".join((*order, *rest, CHECKS)).format(**names))
    code = f"""
import os, sys
for program in {programs!r}:
    child = os.fork()
    if not child:
        exec(program, {{}})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
"""
    python(code)


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(verb: str) -> None:
    function, text = getattr(api, verb), pydoc.plain(pydoc.render_doc(getattr(rushhour, verb)))
    signature = inspect.signature(function)
    assert f"rushhour.{verb}(" in text
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not parameter.empty, name
        assert name in text
        described = f"{name}:" in (function.__doc__ or "")
        assert described, f"{name} is not explained"
    assert "Raises:" in text
    assert inspect.signature(getattr(rushhour, verb)) == signature


def test_the_verbs_of_the_command_line_are_those_of_the_api() -> None:
    assert set(cli.commands) - CLI_ONLY == set(COMMANDS.values())


PYTHON_ONLY = {"progress", "on_window", "on_tick", "stop", "settings", "log_file", "example", "columns"}
SHOWN_ONLY = {"json_file", "plot"}
"""Of the command line alone: where a result is shown or written."""
COLUMNS = {"targets", "group", "time", "categories", "leave_out"}
"""Options that Python takes as `columns`."""
IN_OBJECTS = {
    "deploy": {"status", "undo", "delete"},
    "train": {"backend", "memory", "compress_gradients", "batch_norm", "shared_memory", "local_sgd", "diloco"},
    "serve": {
        "no_grpc", "admin_port", "admin_host", "api_key_file", "tls_cert", "tls_key", "expose", "known_as", "admin",
        "shared_memory", "idle_timeout", "request_timeout", "max_body", "grpc_max_message", "grpc_ping_interval",
        "grpc_keepalive", "grpc_max_age", "grpc_max_age_grace", "drain_delay", "drain_timeout", "frozen_after",
        "log_format", "log_level", "log_requests", "server_timing", "otel", "otel_sample", "strict",
    },
}  # fmt: skip
"""Options that Python takes in one object: a `ParallelSettings`, `ServeSettings`; methods of a `Deployed`."""


@pytest.mark.parametrize("verb", VERBS)
def test_command_line_and_api_agree_on_names_and_defaults(verb: str) -> None:
    function = inspect.signature(getattr(api, verb)).parameters
    command = cli.commands[COMMANDS[verb]]
    params = {param.name: param for param in command.params}
    assert set(params) - SHOWN_ONLY - COLUMNS - IN_OBJECTS.get(verb, set()) == set(function) - PYTHON_ONLY
    for name, parameter in function.items():
        if name in PYTHON_ONLY or parameter.default is parameter.empty:
            continue
        default = params[name].get_default(click.Context(command))
        assert plain(default) == plain(parameter.default), name


def plain(value: Any) -> Any:
    """A default that stands for nothing, whichever way it is written."""
    return None if value in ((), "", None) or str(value).startswith("Sentinel") else value


def test_the_options_that_are_objects_in_python_have_the_objects_defaults() -> None:
    from rushhour.cli.serve import settings_of
    from rushhour.cli.train import parallel_of
    from rushhour.serve import ServeSettings
    from rushhour.train import ParallelSettings

    def defaults(verb: str, *required: str) -> dict[str, Any]:
        return cli.commands[verb].make_context(verb, list(required)).params

    assert parallel_of(defaults("train", "mlp", "--data", "x", "--out", "y")) == ParallelSettings()
    assert settings_of(defaults("serve", "x")) == ServeSettings(grpc_port=8001, exact=False)
