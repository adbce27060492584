"""A smoke test of the campaign: it finds existing faults, and hostile files cause none."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import projects
from tests.campaign import mutations
from tests.campaign.trials import Outcome, Tally

pytestmark = pytest.mark.slow

# In its own process: trials are forked, and a process that has used many threads cannot be forked safely.
_HOSTILE = """
import random, sys
from pathlib import Path
from tests.campaign import hostile, trials
trials.warm()
project = Path(sys.argv[1])
for tally in hostile.run(project, random.Random(0), 1, {"configuration", "GGUF"}):
    print(tally.tried, tally.held, tally.failures)
outcome = trials.forked(lambda: 1 / 0, project, 30)
print(outcome.held, "ZeroDivisionError" in outcome.output)
outcome = trials.forked(lambda: __import__("time").sleep(60), project, 0.5)
print(outcome.code, outcome.held)
"""


def test_hostile_files_are_handled_and_faults_are_found(tmp_path: Path) -> None:
    project = projects.bare(tmp_path / "project")
    env = projects.environment(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", _HOSTILE, str(project)],
        cwd=projects.REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["12 12 []", "9 9 []", "False True", "None False"]


def test_outcomes_are_judged() -> None:
    tally = Tally("some")
    for code, output in ((0, ""), (2, "Error: no such file"), (3, "Error: refused")):
        tally.judge("well", Outcome(code, output, 0.1))
    for code, output in (
        (2, ""),
        (70, "Traceback (most recent call last)\nKeyError"),
        (None, ""),
        (-9, "Error: killed"),
    ):
        tally.judge("not", Outcome(code, output, 0.1))
    tally.judge("wrong", Outcome(0, "", 0.1), "it ended in other weights")
    assert (tally.tried, tally.held, len(tally.failures)) == (8, 3, 5)
    assert tally.failures[-1] == "wrong: it ended in other weights"


def test_each_mutation_changes_a_file_and_repeats(tmp_path: Path) -> None:
    content = os.urandom(2000)
    for name in mutations.MUTATIONS:
        results = []
        for again in range(2):
            path = tmp_path / f"{name}-{again}"
            path.write_bytes(content)
            mutations.mutate(path, name, random.Random(name))
            results.append(None if path.is_dir() else path.read_bytes())
        assert results[0] == results[1] != content
