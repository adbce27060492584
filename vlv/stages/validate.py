"""Validation: check data/ against its gate before any training."""

from typing import Any

from vlv import tracking
from vlv.config import Config, Paths
from vlv.data import gate as expectations
from vlv.io import files
from vlv.stages import words


def run(settings: Config, paths: Paths) -> dict[str, Any]:
    """Check every shard and sample, and whether the language model's tokenizer covers the captions.

    The verdict is written before a failure is raised.

    Raises:
        DataError: the data fails the gate; the message names the problem and its place.
        AssetError, PretrainedError: the language model's tokenizer is not available.
    """
    tokenizer = words.tokenizer(settings.language_model, paths)
    verdict = expectations.validate(paths.data, settings.data.gate, tokenizer=tokenizer)
    result: dict[str, Any] = verdict.model_dump(mode="json")
    files.write_json(paths.metrics / "validate.json", result)
    summary = paths.work / "validate" / "summary.md"
    files.write_text(summary, expectations.summary_markdown(verdict))
    with tracking.start_run(paths, "validate", system_metrics=False) as run_:
        run_.log_artifact(summary)
        run_.log_metrics({"success": float(verdict.success), "failures": float(len(verdict.failures()))})
    # The trainings depend only on whether it passed, so another expectation makes no training stale.
    files.write_json(paths.work / "validate" / "verdict.json", {"success": verdict.success})
    misfit = any(not held.holds(settings.data.gate.min_share_held) for held in verdict.vocabulary.values())
    verdict.check(words.remedy(settings, paths) if misfit else "")
    return result
