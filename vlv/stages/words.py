"""Checks whether the language model's tokenizer covers the captions in data/, and which profiles' tokenizers do."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from vlv import config
from vlv.config import Config, LanguageModel, Paths
from vlv.data import shards
from vlv.data.vocabulary import Coverage, coverage
from vlv.io import assets, files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 20_000  # captions that are checked here; the data gate checks all of them


def tokenizer(part: LanguageModel, paths: Paths) -> "PreTrainedTokenizerBase | None":
    """The language model's tokenizer, fetched without the weights; None for an architecture without a tokenizer.

    Raises:
        AssetError: the language model cannot be fetched.
        PretrainedError: its tokenizer is missing or cannot be read.
    """
    from vlv.models import build  # torch takes some seconds

    return None if _wordless(part) else build.tokenizer(assets.resolve(part.pretrained, paths, weights=False))


def misfit(settings: Config, paths: Paths) -> str:
    """A warning if the captions in data/ do not fit the language model; "" if they do, or if there are none.

    Opens no connection. If the language model is not on this machine, the text says so.
    """
    captions = _captions(paths)
    part = settings.language_model
    if not captions or _wordless(part):
        return ""
    held = _held(part, paths, captions)
    if held is None:
        return f"The language model {part.pretrained} is not here yet; the run will check whether it knows their words."
    if held.holds(settings.data.gate.min_share_held):
        return ""
    return (
        f"The captions do not fit the language model of the profile {settings.profile}, {part.pretrained}, which "
        f"holds {held}. The run will stop at the data gate. {remedy(settings, paths)}"
    )


def remedy(settings: Config, paths: Paths) -> str:
    """A text that names the profiles for imported images whose language model covers the captions in data/."""
    captions, share = _captions(paths), settings.data.gate.min_share_held
    fitting, absent = [], []
    for name, part in _others(settings, paths).items() if captions else ():
        held = _held(part, paths, captions)
        if held is None:
            absent.append(f"{name} ({part.pretrained})")
        elif held.holds(share):
            fitting.append(name)
    told = [f"Profiles whose language model knows the words: {', '.join(fitting)}."] if fitting else []
    told += [f"Not checked, because the language model is not on this machine: {', '.join(absent)}."] if absent else []
    return " ".join(
        [*told, "Choose one with: vlv config use NAME, and import again (its images may have another size)."]
    )


def _others(settings: Config, paths: Paths) -> dict[str, LanguageModel]:
    """The other language models of profiles for imported images, by profile."""
    found = {}
    for name in config.profiles(paths):
        path = paths.root / "configs" / f"{name}.yaml"
        try:
            other = config.parse(files.read_text(path), str(path))
        except (config.ConfigError, files.FileError):
            continue  # `vlv config use` reports the error
        if other.data.source.kind == "imported" and other.language_model != settings.language_model:
            found[name] = other.language_model
    return found


def _wordless(part: LanguageModel) -> bool:
    return part.weights == "random" and part.architecture is not None


def _held(part: LanguageModel, paths: Paths, captions: list[str]) -> Coverage | None:
    """How much of the captions a language model covers; None if it is not on this machine."""
    from vlv.models import build

    try:
        folder = assets.at_hand(part.pretrained, paths)
        return None if folder is None else coverage(build.tokenizer(folder), captions)
    except (assets.AssetError, build.PretrainedError):  # no such reference; no tokenizer in the folder
        return None


def _captions(paths: Paths) -> list[str]:
    """The first captions of the training images in data/ (in random order); none if the table is damaged."""
    try:
        return list(islice(_read(paths), _LOOKED_AT))
    except (OSError, pa.ArrowException, ValueError):
        return []


def _read(paths: Paths) -> Iterator[str]:
    table = paths.data / "train" / shards.TABLE
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(columns=["caption", "status"]):
            for row in batch.to_pylist():
                if row["status"] == "success" and row["caption"]:
                    yield row["caption"]
