"""The site builds without a warning: dead links, anchors, pages without a place, docstrings that cannot be read."""

import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import ROOT

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site" / "reference" / "model" / "index.html").read_text(encoding="utf-8")
    assert 'id="transformers_worldvla.WorldVLAForCausalLM.generate_actions"' in reference  # found through its mixin
    assert "https://fonts." not in reference
