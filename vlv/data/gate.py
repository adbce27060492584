"""The data gate: the expectations that the data must meet before anything is trained (Great Expectations).

Each expectation is one row in a function `_for_...`. It is checked for each split, on the tables that
vlv.data.inspection reads from the shards. The check does not stop at the first failure: the verdict names each
expectation that failed, with the shard and the sample. A new expectation is a new row.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel

from vlv import config
from vlv.data import shards
from vlv.data.inspection import inspect
from vlv.data.shards import DataError, Manifest
from vlv.data.vocabulary import Coverage, Vocabulary
from vlv.io import tables, telemetry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 10


class Example(BaseModel):
    """One failure: the place, such as "train/00003.tar sample 000030017", and what was found there."""

    where: str
    found: str


class Result(BaseModel):
    """One expectation on one split. `unexpected` counts the failures, `examples` holds the first ten."""

    name: str
    split: str
    success: bool
    requirement: str
    expectation: str
    checked: int
    unexpected: int
    examples: list[Example]
    message: str


class Verdict(BaseModel):
    """The gate's verdict. It holds no times, so equal data gives an equal verdict.

    Attributes:
        samples: samples that could be read, by split.
        vocabulary: how much of the captions the language model's tokenizer holds, by split; empty without a tokenizer.
    """

    success: bool
    samples: dict[str, int]
    results: list[Result]
    vocabulary: dict[str, Coverage] = {}

    def failures(self) -> list[Result]:
        """The expectations that failed."""
        return [result for result in self.results if not result.success]

    def check(self, remedy: str = "") -> None:
        """Raise a `DataError` that lists every failure and the remedy, if there is a failure."""
        failed = self.failures()
        if failed:
            lines = "\n".join(f"  {result.message}" for result in failed)
            told = f"\n{remedy}" if remedy else ""
            raise DataError(f"The data gate refuses the data, {len(failed)} expectation(s) failed:\n{lines}{told}")


def validate(
    data: Path,
    gate: config.DataGate,
    splits: list[str] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Verdict:
    """Check the data against the gate. Bad data gives a verdict, not an exception.

    Args:
        data: the data folder.
        gate: the bounds.
        splits: the splits to check; None: those of the manifest.
        tokenizer: of the language model; None: the words of the captions are not checked.
    """
    try:
        manifest = shards.read_manifest(data)
    except DataError as error:
        missing = _plain("manifest_is_readable", "", "the manifest can be read", str(error))
        return Verdict(success=False, samples={}, results=[missing])
    wanted = list(manifest.splits) if splits is None else splits
    present = [split for split in wanted if split in manifest.splits]
    results = [
        _plain(
            "split_is_there",
            split,
            "the manifest has the split",
            f"{data / shards.MANIFEST} has no {split!r}",
        )
        for split in wanted
        if split not in manifest.splits
    ]
    found = inspect(data, manifest, present, None if tokenizer is None else Vocabulary(tokenizer))
    checker = _Checker()
    counts: dict[str, int] = {}
    for split in present:
        samples = found.samples[found.samples["split"] == split]
        counts[split] = len(samples)
        results += checker.run(split, "file", found.files[found.files["split"] == split], _for_files())
        wanted_of_samples = _for_samples(gate, manifest)
        if split in found.vocabulary:
            held = found.vocabulary[split]
            row = pd.DataFrame({"where": [str(held)], "share_of_words": [held.share_of_words]})
            results += checker.run(split, "split", row, _for_words(gate))
            wanted_of_samples += _for_captions(gate)
        results += checker.run(split, "sample", samples, wanted_of_samples)
    success = all(result.success for result in results)
    return Verdict(success=success, samples=counts, results=results, vocabulary=found.vocabulary)


def _expectations() -> Any:
    """The expectations of Great Expectations. Importing it takes some ten seconds, so this is done late."""
    telemetry.off()  # read when the library is imported
    return importlib.import_module("great_expectations.expectations")


def _for_files() -> list[Any]:
    """Expectations on each shard and samples.parquet of a split."""
    gxe = _expectations()
    return [
        _named(gxe.ExpectColumnValuesToBeInSet(column="exists", value_set=[True]),
               "file_exists", "each file of the manifest is there"),
        _named(gxe.ExpectColumnValuesToBeInSet(column="listed", value_set=[True]),
               "file_is_listed", "no file is there that the manifest does not list"),
        _named(gxe.ExpectColumnValuesToBeNull(column="damage"),
               "file_is_readable", "each file can be read to its end"),
        _equal("bytes", "manifest_bytes", "file_size", "each file has the size in the manifest, in bytes"),
        _equal("sha256", "manifest_sha256", "file_hash", "each file has the sha256 in the manifest"),
        _equal("samples", "manifest_samples", "sample_count", "it has as many samples as in the manifest"),
    ]  # fmt: skip


def _for_samples(gate: config.DataGate, manifest: Manifest) -> list[Any]:
    """Expectations on each sample of a split."""
    gxe = _expectations()
    share, low, high = gate.max_duplicate_share, gate.caption_words_min, gate.caption_words_max
    chosen = [
        _named(gxe.ExpectTableRowCountToBeBetween(min_value=1),
               "split_has_samples", "the split has at least one sample"),
        _named(gxe.ExpectColumnValuesToBeNull(column="image_error"),
               "image_decodes", "each image decodes"),
        _named(gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=["RGB"]),
               "image_mode", "each image is RGB: 3 channels of 8 bits"),
        _named(gxe.ExpectColumnValuesToBeBetween(column="short_side", min_value=gate.min_side),
               "image_min_side", f"the shorter side has at least {gate.min_side} pixels"),
        _named(gxe.ExpectColumnValuesToBeBetween(column="aspect", max_value=gate.max_aspect),
               "image_aspect", f"longer side / shorter side is at most {gate.max_aspect:g}"),
        _equal("width", "json_width", "json_width", "the width is that in the sample's JSON"),
        _equal("height", "json_height", "json_height", "the height is that in the sample's JSON"),
        _equal("sha256", "json_sha256", "json_hash", "the image's sha256 is that in the sample's JSON"),
        _named(gxe.ExpectColumnValuesToNotBeNull(column="table_sha256"),
               "table_has_sample", "samples.parquet has a row for each sample"),
        _equal("sha256", "table_sha256", "table_hash", "the image's sha256 is that in samples.parquet"),
        _named(gxe.ExpectColumnValueLengthsToBeBetween(column="stripped_caption", min_value=1),
               "caption_not_empty", "no caption is empty"),
        _named(gxe.ExpectColumnValuesToBeBetween(column="caption_words", min_value=low, max_value=high),
               "caption_words", f"each caption has {low} to {high} words"),
        _named(gxe.ExpectColumnValuesToBeNull(column="duplicate_of", mostly=1 - share),
               "no_duplicates", f"at most {share:.1%} of the images repeat an earlier one of the split"),
        _named(gxe.ExpectColumnValuesToBeNull(column="image_also_in"),
               "no_image_overlap", "no image appears in an earlier split"),
        _named(gxe.ExpectColumnValuesToBeNull(column="scene_also_in"),
               "no_scene_overlap", "no scene specification appears in an earlier split"),
    ]  # fmt: skip
    if gate.captions_required:
        caption = gxe.ExpectColumnValuesToNotBeNull(column="caption")
        chosen.append(_named(caption, "caption_present", "each sample has a caption"))
    size = manifest.source.get("image_size")
    if isinstance(size, int):
        for side in ("width", "height"):
            one_size = gxe.ExpectColumnValuesToBeInSet(column=side, value_set=[size])
            chosen.append(_named(one_size, f"image_{side}", f"each image has the {side} {size}, as the manifest says"))
    return chosen


def _for_captions(gate: config.DataGate) -> list[Any]:
    """Expectations on each sample, if the language model's tokenizer is known."""
    gxe, share = _expectations(), gate.min_share_held
    held = gxe.ExpectColumnValueLengthsToBeBetween(column="unknown_words", max_value=0, mostly=share)
    return [
        _named(held, "captions_held", f"the language model's tokenizer holds every word of {share:.1%} of the captions")
    ]


def _for_words(gate: config.DataGate) -> list[Any]:
    """Expectations on all words of a split together, in one row."""
    gxe, share = _expectations(), gate.min_share_held
    held = gxe.ExpectColumnValuesToBeBetween(column="share_of_words", min_value=share)
    return [
        _named(held, "words_held", f"the language model's tokenizer holds {share:.1%} of the words of the captions")
    ]


def _named(expectation: Any, name: str, requirement: str) -> Any:
    expectation.meta = {"name": name, "requirement": requirement}
    return expectation


def _equal(found: str, declared: str, name: str, requirement: str) -> Any:
    gxe = _expectations()
    pair = gxe.ExpectColumnPairValuesToBeEqual(
        column_A=found, column_B=declared, ignore_row_if="either_value_is_missing"
    )
    return _named(pair, name, requirement)


class _Checker:
    """Runs expectations in one Great Expectations context, in memory."""

    def __init__(self) -> None:
        _expectations()
        self._gx: Any = importlib.import_module("great_expectations")
        context = self._gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        self._source = context.data_sources.add_pandas("inspection")

    def run(self, split: str, what: str, table: pd.DataFrame, expectations: list[Any]) -> list[Result]:
        table = table.reset_index(drop=True)
        if "caption" in table:
            table["stripped_caption"] = table["caption"].map(str.strip, na_action="ignore").astype(object)
        asset = self._source.add_dataframe_asset(f"{what}s of {split}")
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table})
        suite = self._gx.ExpectationSuite(f"{what}s of {split}", expectations=expectations)
        form = {"result_format": "COMPLETE", "unexpected_index_column_names": ["where"]}
        by_name = {r.expectation_config.meta["name"]: r for r in batch.validate(suite, result_format=form).results}
        return [_result(by_name[one.meta["name"]], split, what, len(table)) for one in expectations]


def _result(raw: Any, split: str, what: str, rows: int) -> Result:
    about, found = raw.expectation_config.meta, raw.result
    listed: list[dict[str, Any]] = found.get("unexpected_index_list") or []
    examples = [_example(entry) for entry in listed[:_EXAMPLES]]
    unexpected = found.get("unexpected_count", 0 if raw.success else 1)
    message = ""
    if not raw.success:
        problem = f"{unexpected} of {rows} {what}s: " + "; ".join(f"{e.where} ({e.found})" for e in examples)
        if not examples:
            problem = f"found {found['observed_value']}" if "observed_value" in found else _exception(raw)
        more = " ..." if len(listed) > len(examples) else ""
        message = f"{split}: {about['name']} ({about['requirement']}): {problem}{more}"
    return Result(
        name=about["name"],
        split=split,
        success=bool(raw.success),
        requirement=about["requirement"],
        expectation=raw.expectation_config.type,
        checked=rows,
        unexpected=unexpected,
        examples=examples,
        message=message,
    )


def _example(entry: dict[str, Any]) -> Example:
    values = [value for name, value in entry.items() if name != "where"]
    return Example(where=entry["where"], found=", not ".join(str(value) for value in values)[:300])


def _exception(raw: Any) -> str:
    """Why Great Expectations could not compute an expectation, which counts as a failure."""
    infos = [info for info in raw.exception_info.values() if isinstance(info, dict)]
    return "; ".join(str(info.get("exception_message")) for info in infos) or "could not be computed"


def _plain(name: str, split: str, requirement: str, message: str) -> Result:
    """A failure that is found before there is a table."""
    return Result(
        name=name, split=split, success=False, requirement=requirement, expectation="vlv", checked=1,
        unexpected=1, examples=[], message=message,
    )  # fmt: skip


def summary_markdown(verdict: Verdict) -> str:
    """The verdict as a Markdown page: what failed and where, then a table of all expectations."""
    counts = ", ".join(f"{split} {count:,}" for split, count in verdict.samples.items()) or "none read"
    lines = [f"# Data gate: {'passed' if verdict.success else 'FAILED'}", "", f"Samples: {counts}.", ""]
    for result in verdict.failures():
        message = result.message.replace("\n", " ")
        lines += [f"- **{result.name}**: {message}"]
    splits = list(dict.fromkeys(result.split for result in verdict.results))
    by_place = {(result.requirement, result.split): result for result in verdict.results}
    rows = []
    for requirement in dict.fromkeys(result.requirement for result in verdict.results):
        cells = [requirement]
        for split in splits:
            one = by_place.get((requirement, split))
            cells.append("" if one is None else "ok" if one.success else f"**{one.unexpected} of {one.checked}**")
        rows.append(cells)
    return "\n".join([*lines, "", tables.markdown(["expectation", *splits], rows)]) + "\n"
