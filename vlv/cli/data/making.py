"""`vlv data download` and `vlv data verify`: the data that params.yaml describes."""

from typing import Annotated, Any

import typer

from vlv import config
from vlv.config import Config, Paths


def download(
    if_missing: Annotated[
        bool,
        typer.Option(
            "--if-missing",
            help="Keep data of these settings, even if it is damaged (`data verify` finds damage).",
        ),
    ] = False,
) -> None:
    """Fetch the assets and make the data that params.yaml describes. Damaged data is made again.

    If the settings differ from those in data.dvc, the new data is pinned. [dim]vlv data download[/]
    """
    from vlv.data import sources

    paths = Paths.find()
    chosen = config.load(paths)
    _fetch_assets(chosen, paths)
    if if_missing and _is_there(chosen, paths):
        typer.echo("The data is there; to check that it is intact: vlv data verify")
    else:
        typer.echo(_counts(sources.materialise(chosen.data, paths, paths.data, _Progress())))
    _pin_if_other(paths)


def verify() -> None:
    """Compare every shard with the manifest, and the whole of data/ with data.dvc. Writes nothing."""
    from vlv.data import shards
    from vlv.io import pin

    paths = Paths.find()
    pointer = paths.root / pin.POINTER
    pinned = pointer.exists()
    shards.verify(paths.data, pointer if pinned else None)
    against = f"its manifest and {pointer.name}" if pinned else "its manifest (nothing is pinned yet)"
    typer.echo(f"{_counts(shards.read_manifest(paths.data))}: as in {against}")


def _is_there(chosen: Config, paths: Paths) -> bool:
    """Whether data/ holds data of these settings, intact or not."""
    from vlv.data import shards, sources

    if not paths.data.exists():
        return False
    try:
        source = shards.read_manifest(paths.data).source
    except shards.DataError:
        return True  # damaged: it is repaired only without --if-missing
    wanted = sources.describe(chosen.data)
    return {key: source.get(key) for key in wanted} == wanted


def _pin_if_other(paths: Paths) -> None:
    """Pin the data if it was made from other settings than the pinned data. Damaged data is never pinned."""
    from vlv.data import shards
    from vlv.io import pin

    pointer = paths.root / pin.POINTER
    try:
        source = shards.read_manifest(paths.data).source
        if pin.is_needed(paths, source):
            shards.verify(paths.data, None)
            pin.add(paths, source)
            typer.echo(f"Pinned in {pin.POINTER} (commit it)")
        elif pointer.exists() and (paths.root / ".dvc").is_dir() and not pin.is_cached(paths):
            shards.verify(paths.data, pointer)  # a fresh clone made the pinned data again; now DVC's cache gets it
            pin.cache(paths)
    except shards.DataError:
        return  # `data verify` says what is wrong


def _fetch_assets(chosen: Config, paths: Paths) -> None:
    """Fetch everything that a later stage needs, so that a network that fails stops the run here."""
    from vlv.io import assets

    for reference in _references(chosen):
        assets.resolve(reference, paths)
        typer.echo(f"asset {reference}")


def _references(chosen: Config) -> list[str]:
    """References in the configuration to things outside the project folder."""
    loaded = [part.pretrained for part in (chosen.encoder, chosen.decoder, chosen.language_model)
              if part.weights == "pretrained"]  # fmt: skip
    named = [*loaded, chosen.evaluate.feature_network, chosen.evaluate.sentence_model, *chosen.data.source.assets]
    return [one for one in named if one and one.startswith(("wheel:", "hf:"))]


def _counts(manifest: Any) -> str:
    return ", ".join(f"{split} {entry.samples}" for split, entry in manifest.splits.items()) + " samples"


class _Progress:
    """Shows the library's progress calls (what, done, total) as one meter for each thing that is made."""

    def __init__(self) -> None:
        self._what, self._done = "", 0
        self._meter: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        from vlv.io.progress import Meter

        if what != self._what:
            self._what, self._done = what, 0
            self._meter = Meter(f"data: {what}", total)
            self._meter.__enter__()
        self._meter.advance(done - self._done)
        self._done = done
        if done >= total:
            self._meter.__exit__(None, None, None)
