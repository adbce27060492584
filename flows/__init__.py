"""Orchestration with Prefect: when and where stages run, retries, time limits. DVC decides what is stale.

Importing this package sets defaults for Prefect's settings, so it must come before `import prefect`. The user's own
environment wins.
"""

import contextlib
import os
import tomllib
from pathlib import Path

from vlv.config import ConfigError, Paths
from vlv.io import files, telemetry

_DEFAULTS = {
    # The temporary server needs about 20 s on two busy cores, Prefect waits 20 s by default.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
}


def _profile_names_a_server() -> bool:
    """Whether the user's active Prefect profile (`prefect config set`) names a server."""
    try:
        profiles = tomllib.loads(files.read_text(Path.home() / ".prefect" / "profiles.toml"))
        active = profiles.get("profiles", {}).get(profiles.get("active", ""), {})
    except (files.FileError, tomllib.TOMLDecodeError):
        return False
    return bool(active.get("PREFECT_API_URL"))


def _set_defaults() -> None:
    telemetry.off()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    chosen = {"PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE"} & set(os.environ)
    if chosen or _profile_names_a_server():
        return
    with contextlib.suppress(ConfigError):  # not in a project: the flow itself says so
        os.environ["PREFECT_HOME"] = str(Paths.find().root / ".prefect")


_set_defaults()
