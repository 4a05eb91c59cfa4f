"""Packages that only serving needs."""

import importlib
from typing import Any


def import_extra(module: str) -> Any:
    """Import a package of the extra `serve`, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(f'this needs {error.name}: pip install "transformers_worldvla[serve]"') from None
