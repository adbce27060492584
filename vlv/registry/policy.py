"""What a model must show before it is promoted: mlflow/policy.yaml, one section for each profile.

Figures are those of metrics/evaluate.json under dotted keys ("scenes.exact_match").
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from vlv.config import Paths, Section
from vlv.evaluation import metrics
from vlv.io import files

Gate = Literal["thresholds", "champion", "data", "serving", "git"]
Figures = Mapping[str, float]


class PolicyError(ValueError):
    """mlflow/policy.yaml cannot be used; the message names the key and the remedy."""


class Limit(Section):
    """Bounds of one figure. With `relative_to` they are shares of that other figure."""

    min: float | None = Field(default=None, description="inclusive")
    max: float | None = Field(default=None, description="inclusive")
    above: float | None = Field(default=None, description="a lower bound that is itself not enough")
    relative_to: str | None = None
    where_measured: bool = Field(default=False, description="met by a version that lacks the figure")
    reason: str = Field(default="", description="what it means that the limit is not met, for the refusal")

    @model_validator(mode="after")
    def _check(self) -> "Limit":
        if self.min is None and self.max is None and self.above is None:
            raise ValueError("a limit needs min, max or above")
        return self


class Comparison(Section):
    """How one figure is compared with the champion's. The table of metrics says which direction is better."""

    tolerance: float = Field(ge=0.0, description="how much worse than the champion is still accepted")

    @model_validator(mode="before")
    @classmethod
    def _without_direction(cls, given: Any) -> Any:
        if isinstance(given, dict) and "better" in given:
            raise ValueError("remove `better`: vlv/evaluation/metrics.py says which direction is better")
        return given


class VersusChampion(Section):
    """Comparison with the champion, which is fair on the same evaluation set only."""

    other_evaluation_set: Literal["refuse", "allow"] = Field(
        description="what to do where the champion was evaluated on other samples: refuse, or let the "
        "thresholds alone decide and say so in the history"
    )
    figures: dict[str, Comparison]


class Policy(Section):
    """One profile's section."""

    gates: list[Gate] = Field(description="the gates that are run, in this order")
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
    """The section of a profile, or `default` where it has none.

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
        # "not >=" rather than "<": a NaN meets nothing.
        if limit.min is not None and not value >= limit.min * base:
            failures.append(f"{key} is {value:.4g}, at least {limit.min:.4g}{share} is asked for{known}{reason}")
        if limit.max is not None and not value <= limit.max * base:
            failures.append(f"{key} is {value:.4g}, at most {limit.max:.4g}{share} is asked for{known}{reason}")
        if limit.above is not None and not value > limit.above * base:
            failures.append(f"{key} is {value:.4g}, more than {limit.above:.4g}{share} is asked for{known}{reason}")
    return failures


def worse_than_champion(policy: Policy, figures: Figures, champion: Figures) -> list[str]:
    """One sentence for each figure that falls behind the champion's by more than its tolerance."""
    failures = []
    for key, comparison in policy.champion.figures.items() if policy.champion else ():
        row = metrics.about(key)
        if row is None or key not in champion:
            continue  # the champion was never measured in this
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
                f"{key} is {value:.4g}, at {word} {limit:.4g} is asked for; the champion has {theirs:.4g} "
                f"(tolerance {comparison.tolerance:.4g})"
            )
    return failures
