"""kill -9 in the middle of both stages: the same command then ends in the same bytes. `make kills` tries 20."""

from pathlib import Path

import pytest

from tests import kills

pytestmark = pytest.mark.training
KILLS = 2


@pytest.mark.parametrize(("stage", "seed"), [("stage1", 1), ("stage2", 2)])
def test_killed_and_run_again_gives_the_same_bytes(trained_smoke: Path, tmp_path: Path, stage: str, seed: int) -> None:
    assert kills.differs(trained_smoke, tmp_path / "project", stage, kills.draw(KILLS, seed)) is None


def test_a_seed_gives_the_same_kills() -> None:
    assert kills.draw(3, seed=5) == kills.draw(3, seed=5) != kills.draw(3, seed=6)
    drawn = [kills.draw(3, seed) for seed in range(100)]
    assert {kill.rows for one in drawn for kill in one} == {1, 2, 3, 4, 5}
    assert all(
        one == sorted(one, key=lambda kill: kill.rows) and len({kill.rows for kill in one}) == 3 for one in drawn
    )
