"""Imported by every Python process under `python -m rushhour.testing.disturbers --waves`: slows down its engines."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `rushhour.engines` like the other finders, and changes it once it is loaded. Nothing is imported before."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != "rushhour.engines":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            from rushhour.testing.disturbers import slow_all_engines

            slow_all_engines()

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
