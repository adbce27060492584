"""Both stages still compute the golden numbers of tests/golden.json."""

import json
from pathlib import Path

import pytest

from tests import golden


@pytest.mark.training
def test_both_stages_compute_the_golden_numbers(tmp_path: Path) -> None:
    expected = json.loads(golden.GOLDEN.read_text(encoding="utf-8"))
    found = golden.compute(tmp_path)
    for stage in ("stage1", "stage2"):
        remedy = f"{stage} computes other numbers. If that is intended: python -m tests.golden --write"
        assert found[stage]["losses"] == pytest.approx(expected[stage]["losses"], rel=golden.TOLERANCE), remedy
        assert found[stage]["gradients"] == pytest.approx(expected[stage]["gradients"], rel=golden.TOLERANCE), remedy
