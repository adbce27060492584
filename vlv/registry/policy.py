"""What a version must show before it becomes champion: the sections of mlflow/policy.yaml and the gates that they name.

A gate is a function in this file and a row of `GATES`. It returns sentences that say what is wrong; none means that the
version passed. Figures are those of metrics/evaluate.json under dotted keys ("scenes.exact_match").
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from vlv.config import Paths, Section
from vlv.evaluation import metrics
from vlv.io import files

SERVING_SECONDS = 900  # with the download of a large model from a remote store

Figures = Mapping[str, float]


class PolicyError(ValueError):
    """mlflow/policy.yaml cannot be used; the message names the key and the remedy."""


class Limit(Section):
    """Bounds of one figure. With `relative_to` they are shares of that other figure."""

    min: float | None = Field(default=None, description="inclusive")
    max: float | None = Field(default=None, description="inclusive")
    above: float | None = Field(default=None, description="exclusive lower bound")
    relative_to: str | None = None
    where_measured: bool = Field(default=False, description="a version without the figure passes")
    reason: str = Field(default="", description="what it means that the limit is not met, for the message")

    @model_validator(mode="after")
    def _check(self) -> "Limit":
        if self.min is None and self.max is None and self.above is None:
            raise ValueError("a limit needs min, max or above")
        return self


class Comparison(Section):
    """How one figure is compared with the champion's. The table of metrics says which direction is better."""

    tolerance: float = Field(ge=0.0, description="how much worse than the champion a version may be")

    @model_validator(mode="before")
    @classmethod
    def _without_direction(cls, given: Any) -> Any:
        if isinstance(given, dict) and "better" in given:
            raise ValueError("remove `better`: vlv/evaluation/metrics.py says which direction is better")
        return given


class VersusChampion(Section):
    """The comparison with the champion, which is fair on the same evaluation set only."""

    other_evaluation_set: Literal["refuse", "allow"] = Field(
        description="where the champion was evaluated on other samples: refuse the version, or let the thresholds "
        "alone decide and say so in the history"
    )
    figures: dict[str, Comparison]


def _known(gate: str) -> str:
    if gate not in GATES:
        raise ValueError(f"there is no gate {gate!r}; there are: {', '.join(GATES)}")
    return gate


class Policy(Section):
    """One profile's section."""

    gates: list[Annotated[str, AfterValidator(_known)]] = Field(description="the gates to run, in this order")
    thresholds: dict[str, Limit] = Field(default_factory=dict)
    champion: VersusChampion | None = None

    @model_validator(mode="after")
    def _check(self) -> "Policy":
        if "champion" in self.gates and self.champion is None:
            raise ValueError("the gate 'champion' needs the section 'champion'")
        if "thresholds" in self.gates and not self.thresholds:
            raise ValueError("the gate 'thresholds' needs the section 'thresholds'")
        compared = list(self.champion.figures) if self.champion else []
        limits = [*self.thresholds, *(limit.relative_to for limit in self.thresholds.values() if limit.relative_to)]
        if unknown := [key for key in [*limits, *compared] if metrics.about(key) is None]:
            raise ValueError(
                f"metrics/evaluate.json has no figure {', '.join(unknown)}; its figures are named PART.NAME, "
                "PART.upper_bound.NAME, PART.baselines.BASELINE.NAME, PART.versus_shuffled.NAME.low, and so on, with "
                "the parts and names of vlv/evaluation/metrics.py"
            )
        return self


def load_policy(paths: Paths, profile: str) -> Policy:
    """The section of a profile; `default` where the file has none for it.

    Raises:
        PolicyError: no such file, no fitting section, or a section that is not valid.
    """
    path = paths.root / "mlflow" / "policy.yaml"
    if not path.exists():
        raise PolicyError(f"{path} does not exist. Restore it from git: it says what a champion must show.")
    try:
        sections = TypeAdapter(dict[str, Policy]).validate_python(files.read_yaml_mapping(path, "Correct it."))
    except files.FileError as error:
        raise PolicyError(str(error)) from error
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, one['loc'])) or '(whole file)'}: {one['msg']}" for one in error.errors()]
        raise PolicyError(f"{path} has {len(lines)} error(s):\n" + "\n".join(lines)) from error
    found = sections.get(profile) or sections.get("default")
    if found is None:
        raise PolicyError(f"{path} has neither a section {profile!r} nor 'default'.")
    return found


@dataclass(frozen=True)
class Candidate:
    """A version that is to become champion, and the present champion."""

    name: str
    version: int
    tags: dict[str, str]
    figures: Figures
    fetch: Callable[[Path], Path]  # copies the version's files into a folder and returns where
    champion: int | None = None
    champion_set: str | None = None
    champion_figures: Figures | None = None
    notes: list[str] = field(default_factory=list)  # for the history


def _thresholds(policy: Policy, candidate: Candidate) -> list[str]:
    """The figures meet the policy's limits."""
    return below_thresholds(policy, candidate.figures, candidate.champion_figures)


def _champion(policy: Policy, candidate: Candidate) -> list[str]:
    """The version is not worse than the champion on the same evaluation set."""
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


def _data(_policy: Policy, candidate: Candidate) -> list[str]:
    """The data validation passed in the run that made the version."""
    return _tag(candidate, "data_validation", "passed", "vlv run validate")


def _git(_policy: Policy, candidate: Candidate) -> list[str]:
    """Code and configuration were committed."""
    return _tag(candidate, "git_dirty", "false", "commit, and run the pipeline again")


def _tag(candidate: Candidate, tag: str, wanted: str, remedy: str) -> list[str]:
    value = candidate.tags.get(tag, "unknown")
    return [] if value == wanted else [f"the tag {tag} is {value!r}, but must be {wanted!r} (remedy: {remedy})"]


def _serving(_policy: Policy, candidate: Candidate) -> list[str]:
    """The registered version loads and predicts on its own input example, in a process of its own.

    A child runs the code that is stored with the version, not the code that runs here.
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
            # In the scratch folder, because "-m" puts the working folder on the import path.
            result = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=SERVING_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return [f"it does not predict on its input example within {SERVING_SECONDS} s"]
        if result.returncode != 0 or not output.exists():
            reason = "; ".join(line for line in result.stderr.strip().splitlines()[-2:] if line.strip())
            return [f"it does not predict on its input example: {reason or 'no message'}"]
        predictions = files.read_json_object(output).get("predictions", [])
    if len(predictions) != rows:
        return [f"it makes {len(predictions)} predictions for the {rows} rows of its input example"]
    return []


# The names that mlflow/policy.yaml uses.
GATES: dict[str, Callable[[Policy, Candidate], list[str]]] = {
    "thresholds": _thresholds,
    "champion": _champion,
    "data": _data,
    "serving": _serving,
    "git": _git,
}


def below_thresholds(policy: Policy, figures: Figures, champion: Figures | None) -> list[str]:
    """One sentence for each threshold that is not met."""
    failures = []
    for key, limit in policy.thresholds.items():
        base = 1.0 if limit.relative_to is None else figures.get(limit.relative_to)
        value = figures.get(key)
        reason = f" ({limit.reason})" if limit.reason else ""
        if value is None or base is None:
            if value is not None or not limit.where_measured:
                missing = key if value is None else limit.relative_to
                failures.append(f"{missing} is not among the version's figures{reason}")
            continue
        share = "" if limit.relative_to is None else f" of {limit.relative_to} {base:.4g}"
        known = "" if champion is None or key not in champion else f"; the champion has {champion[key]:.4g}"
        # "not >=" rather than "<", so that a NaN meets no limit.
        if limit.min is not None and not value >= limit.min * base:
            failures.append(f"{key} is {value:.4g}, but must be at least {limit.min:.4g}{share}{known}{reason}")
        if limit.max is not None and not value <= limit.max * base:
            failures.append(f"{key} is {value:.4g}, but must be at most {limit.max:.4g}{share}{known}{reason}")
        if limit.above is not None and not value > limit.above * base:
            failures.append(f"{key} is {value:.4g}, but must be more than {limit.above:.4g}{share}{known}{reason}")
    return failures


def worse_than_champion(policy: Policy, figures: Figures, champion: Figures) -> list[str]:
    """One sentence for each figure that is worse than the champion's by more than its tolerance."""
    failures = []
    for key, comparison in policy.champion.figures.items() if policy.champion else ():
        row = metrics.about(key)
        if row is None or key not in champion:
            continue  # this figure of the champion was never measured
        value, theirs = figures.get(key), champion[key]
        if value is None:
            failures.append(f"{key} is not among the version's figures; the champion has {theirs:.4g}")
            continue
        if row.better == "higher":
            limit, met, word = theirs - comparison.tolerance, value >= theirs - comparison.tolerance, "least"
        else:
            limit, met, word = theirs + comparison.tolerance, value <= theirs + comparison.tolerance, "most"
        if not met:
            failures.append(
                f"{key} is {value:.4g}, but must be at {word} {limit:.4g}; the champion has {theirs:.4g} "
                f"(tolerance {comparison.tolerance:.4g})"
            )
    return failures
