"""The switches that keep the libraries from telling their makers about a run. They stand here and nowhere else.

Programs of this project set them for themselves and their children. A shell from which the libraries' own commands are
started (`prefect server start`, `mlflow ui`) gets them with: eval "$(python -m vlv.io.telemetry)"
"""

import os

SWITCHES = {
    "DO_NOT_TRACK": "true",  # MLflow honours only "true"
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # prefect.toml says it too, for a server started by hand
}


def off() -> None:
    """Set the switches for this process and its children; what the user has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    for _name, _value in SWITCHES.items():
        print(f"export {_name}={_value}")
