"""The switches that turn off the libraries' telemetry. They are set here and nowhere else.

This project's programs set them for themselves and their child processes. To set them in a shell that starts the
libraries' own commands (`prefect server start`, `mlflow ui`): eval "$(python -m vlv.io.telemetry)"
"""

import os

SWITCHES = {
    "DO_NOT_TRACK": "true",  # MLflow accepts only "true"
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # also in prefect.toml, for a server started by hand
}


def off() -> None:
    """Set the switches for this process and its children; values that the user has set stay."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    for _name, _value in SWITCHES.items():
        print(f"export {_name}={_value}")
