"""Write requirements.lock from the environment as it is: `make lock`.

uv asks the package index for the hashes of all files of each release; those that a Python of this project can install
are kept, whatever the machine. torch is left out, with what only its CUDA builds need: its builds come from an index of
one's choice, and pyproject.toml pins its version.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from vlv.io import files

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
PYTHONS = {"py3", "py2.py3", "cp311", "cp312"}  # pyproject.toml: requires-python
_APART = re.compile(r"torch|pip|uv|vlv|triton|nvidia-.*|cuda-.*")
_NEWEST_ABI3 = 12  # wheels for the stable interface of Python 3.x serve every later one


def main() -> int:
    """Write the lock; the exit code."""
    uv = shutil.which("uv")
    if uv is None:
        print("make lock needs uv, which reads the hashes from the package index: pip install uv", file=sys.stderr)
        return 2
    pins = sorted({pin for one in distributions() if (pin := _pin(one.name, one.version))}, key=str.lower)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "requirements.txt", Path(folder) / "pylock.toml"
        asked.write_text("\n".join(pins), encoding="utf-8")
        command = [uv, "pip", "compile", "--quiet", "--no-deps", "--universal", "--python-version", "3.11"]
        subprocess.run([*command, "--format", "pylock.toml", str(asked), "--output-file", str(answered)], check=True)
        packages: list[dict[str, Any]] = tomllib.loads(answered.read_text(encoding="utf-8"))["packages"]
    head = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    entries = [_entry(package) for package in packages]
    without = [entry for entry in entries if "--hash" not in entry]
    if without or len(entries) != len(pins):
        print(f"installed: {len(pins)}, on the index: {len(entries)}, without a hash: {without}", file=sys.stderr)
        return 1
    files.write_text(LOCK, "\n".join([*head, *entries]) + "\n")
    return 0


def _pin(name: str, version: str) -> str | None:
    plain = re.sub(r"[-_.]+", "-", name).lower()
    return None if _APART.fullmatch(plain) else f"{plain}=={version.partition('+')[0]}"


def _entry(package: dict[str, Any]) -> str:
    archives = [one for one in package.get("wheels", []) if _fits(_file_name(one))]
    archives += [package["sdist"]] if "sdist" in package else []
    hashes = sorted({one["hashes"]["sha256"] for one in archives})
    return " \\\n    ".join([f"{package['name']}=={package['version']}", *(f"--hash=sha256:{one}" for one in hashes)])


def _file_name(archive: dict[str, Any]) -> str:
    return str(archive.get("name") or archive["url"].rpartition("/")[2])


def _fits(wheel: str) -> bool:
    """Whether a Python of this project can install it, on whatever machine."""
    python, abi = wheel.removesuffix(".whl").split("-")[-3:-1]
    if "abi3" in abi.split("."):
        return any(tag[:3] == "cp3" and int(tag[3:]) <= _NEWEST_ABI3 for tag in python.split("."))
    return python in PYTHONS


if __name__ == "__main__":
    sys.exit(main())
