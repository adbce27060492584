"""Where things lie in a project folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from vlv.config.section import ConfigError


@dataclass(frozen=True)
class Paths:
    """Where things lie in a project folder (the one with params.yaml)."""

    root: Path

    @staticmethod
    def find() -> "Paths":
        """The project that VLV_ROOT names, else the nearest folder upwards with params.yaml or configs/."""
        named = os.environ.get("VLV_ROOT")
        if named:
            return Paths(Path(named).resolve())
        here = Path.cwd().resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").exists() or (folder / "configs" / "tiny.yaml").exists():
                return Paths(folder)
        raise ConfigError(f"No params.yaml in {here} or above it. Go to the project folder, or set VLV_ROOT.")

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def cache(self) -> Path:
        """Derived data, safe to delete: fetched assets, latents, features."""
        return Path(os.environ.get("VLV_CACHE", self.root / ".cache"))
