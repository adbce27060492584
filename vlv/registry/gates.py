"""The gates between a registered version and the alias `champion`.

Each answers with sentences that say what is wrong; no sentence means passed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vlv.io import files
from vlv.registry.policy import Figures, Policy, below_thresholds, worse_than_champion

SERVING_SECONDS = 900  # loading a large model from a remote store included


@dataclass(frozen=True)
class Candidate:
    """A version that asks to be champion, and the champion there is."""

    name: str
    version: int
    tags: dict[str, str]
    figures: Figures
    fetch: Callable[[Path], Path]  # copies the version's files into a folder, and says where
    champion: int | None = None
    champion_set: str | None = None
    champion_figures: Figures | None = None
    notes: list[str] = field(default_factory=list)  # for the history


def thresholds(policy: Policy, candidate: Candidate) -> list[str]:
    """The figures meet the policy's limits."""
    return below_thresholds(policy, candidate.figures, candidate.champion_figures)


def champion(policy: Policy, candidate: Candidate) -> list[str]:
    """Not worse than the champion on the same evaluation set."""
    if candidate.champion is None or candidate.champion_figures is None or policy.champion is None:
        return []
    mine = candidate.tags.get("evaluation_set", "unknown")
    if mine != candidate.champion_set or mine == "unknown":
        theirs = candidate.champion_set
        difference = f"champion {candidate.champion} was evaluated on set {theirs}, this version on {mine}"
        if policy.champion.other_evaluation_set == "refuse":
            return [f"{difference}: the two cannot be compared. Evaluate both on the same set."]
        candidate.notes.append(f"not compared: {difference}")
        return []
    return worse_than_champion(policy, candidate.figures, candidate.champion_figures)


def data(policy: Policy, candidate: Candidate) -> list[str]:
    """The data validation passed in the run that made the version."""
    return _tag(candidate, "data_validation", "passed", "vlv run validate")


def git(policy: Policy, candidate: Candidate) -> list[str]:
    """Code and configuration were committed."""
    return _tag(candidate, "git_dirty", "false", "commit, and run the pipeline again")


def serving(policy: Policy, candidate: Candidate) -> list[str]:
    """The registered version loads and predicts on its own input example, in a process of its own.

    A child, so that the code stored with the version is what runs, not the code that runs here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = candidate.fetch(Path(scratch))
        example = folder / "serving_input_example.json"
        if not example.exists():
            return ["the version has no input example"]
        rows = len(files.read_json(example)["dataframe_split"]["data"])
        output = Path(scratch) / "predictions.json"
        command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local"]
        command += ["-m", str(folder), "-i", str(example), "-t", "json", "-o", str(output)]
        try:
            result = subprocess.run(
                command,
                cwd=scratch,  # "-m" puts this folder on the import path
                capture_output=True,
                text=True,
                timeout=SERVING_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [f"no prediction on its input example within {SERVING_SECONDS} s"]
        if result.returncode != 0 or not output.exists():
            reason = "; ".join(line for line in result.stderr.strip().splitlines()[-2:] if line.strip())
            return [f"it does not predict on its input example: {reason or 'no message'}"]
        predictions = files.read_json_object(output).get("predictions", [])
    if len(predictions) != rows:
        return [f"it gives {len(predictions)} predictions for the {rows} rows of its input example"]
    return []


GATES: dict[str, Callable[[Policy, Candidate], list[str]]] = {
    "thresholds": thresholds,
    "champion": champion,
    "data": data,
    "serving": serving,
    "git": git,
}


def _tag(candidate: Candidate, tag: str, wanted: str, remedy: str) -> list[str]:
    value = candidate.tags.get(tag, "unknown")
    return [] if value == wanted else [f"the tag {tag} is {value!r}, {wanted!r} is asked for (remedy: {remedy})"]
