"""The table of metrics: one row is enough for a new metric to be measured, shown, listed and limited."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import artifacts
from tests.conftest import ROOT
from vlv import config, registry
from vlv.config import Paths
from vlv.evaluation import figures, intervals, metrics, truth
from vlv.evaluation.metrics import Compared, Metric
from vlv.io.tables import numbers
from vlv.registry.policy import below_thresholds, worse_than_champion
from vlv.registry.versions import figures_of


def _mean_error(compared: Compared) -> intervals.Terms:
    pairs = zip(compared.drawn, compared.true, strict=True)
    return intervals.means(np.array([np.abs(a.astype(int) - b.astype(int)).mean() for a, b in pairs]))


NEW = (
    Metric("reconstruction", "mean_error", "error", _mean_error, unit="levels", digits=1, better="lower"),
    Metric("scenes", "nothing_wrong", "nothing wrong", metrics.counted("exact_match")),
)


@pytest.fixture
def _new_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, *NEW))
    yield


def _measured() -> dict[str, Any]:
    pixels = [np.full((4, 4, 3), level, np.uint8) for level in (0, 50, 100)]
    counts = {"exact_match": np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])}
    scenes, drawn = Compared(3, counts), Compared(3, drawn=pixels, true=[one + 5 for one in pixels])
    return {
        "scenes": {**metrics.measure("scenes", scenes), "baselines": {"shuffled": {"n": 3, "nothing_wrong": 0.25}}},
        "reconstruction": metrics.measure("reconstruction", drawn),
    }


@pytest.mark.usefixtures("_new_rows")
def test_one_row_is_enough_for_a_new_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = _measured()
    assert measured["reconstruction"]["mean_error"] == 5.0 and measured["scenes"]["nothing_wrong"] == 0.6667

    paths = Paths(tmp_path)
    paths.metrics.mkdir()
    (paths.metrics / "evaluate.json").write_text(json.dumps(measured))
    scenes, drawn = (table.markdown() for table in artifacts.figures(paths))
    assert "| exact scene | nothing wrong |" in scenes and "| baseline: shuffled | - | 0.250 |" in scenes
    assert "| error, levels |" in drawn and "| 5.0 |" in drawn
    assert artifacts.headline(paths)["reconstruction.mean_error"] == 5.0

    labels: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xticks", lambda self, places, names: labels.extend(names))
    figures.plot_scores({"captions": measured["scenes"]}, "title", tmp_path / "plot.png")
    assert labels == ["exact\nscene", "nothing\nwrong"]

    tagged = type("Version", (), {"name": "m", "tags": {"figures": json.dumps(numbers(measured))}})
    assert metrics.summary(figures_of(tagged)) == (  # type: ignore[arg-type]  # all of a version that is read here
        "scenes: exact scene 0.667, nothing wrong 0.667; reconstruction: PSNR 34.15 dB, error 5.0 levels"
    )

    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "policy.yaml").write_text("""default:
  gates: [thresholds, champion]
  thresholds: {scenes.nothing_wrong: {min: 0.9}}
  champion: {other_evaluation_set: allow, figures: {reconstruction.mean_error: {tolerance: 1.0}}}
""")
    policy = registry.load_policy(paths, "any")
    assert below_thresholds(policy, numbers(measured), None)[0].startswith("scenes.nothing_wrong is 0.6667")
    (worse,) = worse_than_champion(policy, numbers(measured), {"reconstruction.mean_error": 3.0})
    assert worse.startswith("reconstruction.mean_error is 5, but must be at most 4;")


def test_the_policy_refuses_a_figure_that_is_in_no_row(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    for text, wrong in (
        ("thresholds: {scenes.nothing_wrong: {min: 0.9}}", "no figure scenes.nothing_wrong"),
        ("thresholds: {reconstruction.ceiling.psnr: {min: 20.0}}", "no figure reconstruction.ceiling.psnr"),
        ("champion: {other_evaluation_set: allow, figures: {captions.similarity: {better: higher, tolerance: 0.1}}}",
         "remove `better`"),
    ):  # fmt: skip
        (tmp_path / "mlflow" / "policy.yaml").write_text(f"default:\n  gates: []\n  {text}\n")
        with pytest.raises(registry.PolicyError, match=re.escape(wrong)):
            registry.load_policy(Paths(tmp_path), "any")


def test_each_committed_figure_belongs_to_a_row() -> None:
    others = {"n", "guidance", "steps", "seed", metrics.SHARE_OF_UPPER_BOUND}
    for path in [ROOT / "metrics" / "evaluate.json", *(ROOT / "metrics" / "variants").glob("*/evaluate.json")]:
        measured = json.loads(path.read_text(encoding="utf-8"))
        keys = [key for key in numbers(measured) if key.rpartition(".")[2] not in others]
        assert [key for key in keys if metrics.about(key) is None] == [], path
    keys = [row.key for row in metrics.METRICS]
    assert len(keys) == len(set(keys)) and {row.part for row in metrics.METRICS} == set(metrics.PARTS)


def test_figures_that_were_not_measured_are_left_out() -> None:
    assert metrics.measure("reconstruction", Compared(4)) == {"n": 4}
    assert metrics.terms("captions", Compared(4)) == {}
    two = [np.zeros((2, 2, 3), np.uint8)] * 2
    found = metrics.measure("reconstruction", Compared(2, drawn=two, true=two))
    assert found == {"n": 2, "psnr": 100.0}  # no FID without features


def test_the_configuration_names_the_counting_module_and_old_keys_are_refused_with_the_new_name() -> None:
    text = (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    for old, new, told in (
        ("untrained_baseline", "untrained_floor", "evaluate.untrained_floor is now evaluate.untrained_baseline"),
        ("counting: vlv.tiny.counting", "counting: null", "evaluate.recogniser needs evaluate.counting"),
        ("counting: vlv.tiny.counting", "counting: os.path", "evaluate.counting"),  # a module of this package only
    ):
        assert text.count(old) == 1
        with pytest.raises(config.ConfigError, match=re.escape(told)):
            config.parse(text.replace(old, new), "tiny.yaml")
    counting = truth.load("vlv.tiny.counting")
    assert all(callable(getattr(counting, name)) for name in truth.FUNCTIONS)
    assert set(truth.FUNCTIONS) == {name for name in vars(truth.Counting) if not name.startswith("_")}
