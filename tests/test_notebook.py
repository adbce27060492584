"""The notebook runs from its first cell to its last, on the trained smoke profile.

Its code cells run as one script in a child process: a Jupyter kernel would run the same code, and bring some thirty
packages with it.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests import projects
from tests.conftest import ROOT
from vlv.io import files

_NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"


def _cells(kind: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = files.read_json_object(_NOTEBOOK)["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def test_the_notebook_is_committed_without_outputs() -> None:
    assert _cells("markdown") and _cells("code")
    assert [cell["id"] for cell in _cells("code") if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.training
def test_every_cell_runs(trained: Path, tmp_path: Path) -> None:
    script = tmp_path / "tour.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in _cells("code")), encoding="utf-8")
    # The pictures are drawn and not shown.
    done = projects.run(
        projects.python("-W", "ignore", str(script)), trained, MPLBACKEND="Agg", PYTHONPATH=os.fspath(ROOT)
    )
    assert done.returncode == 0, done.stderr
    assert "smoke profile: 8 queries, 64 pixels" in done.stdout
    assert "images, queries, width: (4, 8, 128)" in done.stdout
    assert done.stdout.count("  caption:") == 4
