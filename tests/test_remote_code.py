"""Code in a model's folder is never run and never asked about, even if somebody would type "y"."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import projects

TINY = projects.REPOSITORY / "pretrained" / "tiny"
_AUTO = {
    "AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Words", "code.Words"],
}  # fmt: skip

# Builds each part from each folder, and prints each outcome. One process: the imports take seconds.
_PROGRAM = """
import json, sys
from pathlib import Path
from vlv import config
from vlv.config import Paths
from vlv.evaluation.similarity import SentenceModel
from vlv.models import build, language_model
from vlv.io.images import Preprocessing

root, paths, outcomes = Path(sys.argv[1]), Paths(Path.cwd()), {}
seen = Preprocessing(64, "bicubic", 64)
settings = config.parse((paths.root / "configs" / "tiny.yaml").read_text(), "tiny")

def note(name, build):
    try:
        build()
        outcomes[name] = "built"
    except (Exception, SystemExit) as error:
        outcomes[name] = str(error)

for kind in ("known", "unknown"):
    for weights in ("pretrained", "random"):
        update = {"pretrained": str(root / kind / "language_model"), "architecture": None, "weights": weights}
        section = settings.language_model.model_copy(update=update)
        note(f"{kind} language model, {weights}", lambda: language_model.build(section, paths))
        encoder = settings.encoder.model_copy(update=update | {"pretrained": str(root / kind / "encoder")})
        note(f"{kind} encoder, {weights}", lambda: build.encoder(encoder, seen, 8, paths, None))
    note(f"{kind} tokenizer", lambda: build.tokenizer(root / kind / "language_model"))
    note(f"{kind} sentence model", lambda: SentenceModel(root / kind / "language_model"))
print(json.dumps(outcomes))
"""


def _folder(folder: Path, part: str, kind: str) -> None:
    """A part's folder that says it needs its own code, which leaves a mark where it is run."""
    shutil.copytree(TINY / part, folder)
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((folder / name).read_text()) | {"auto_map": _AUTO}
        if kind == "unknown":
            value |= {"model_type": "unheard-of", "tokenizer_class": "Words"}
        (folder / name).write_text(json.dumps(value))
    if kind == "unknown":
        (folder / "tokenizer.json").unlink()  # that file alone says all
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit('the code ran')\n")


@pytest.mark.slow
def test_it_is_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    for kind in ("known", "unknown"):
        for part in ("language_model", "encoder"):
            _folder(tmp_path / kind / part, part, kind)
    done = subprocess.run(
        projects.python("-c", _PROGRAM, str(tmp_path)),
        cwd=projects.REPOSITORY, env=projects.environment(), input="y\n" * 100, text=True, capture_output=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert list(tmp_path.rglob("ran")) == []
    outcomes = json.loads(done.stdout.splitlines()[-1])
    # Where transformers has a class of its own, that class is used.
    assert {
        name: outcome for name, outcome in outcomes.items() if name.startswith("known") and outcome != "built"
    } == {}
    for weights in ("pretrained", "random"):
        error = outcomes[f"unknown language model, {weights}"]
        assert "config.json names code of its own (auto_map), which is never run here" in error
    assert "unknown/language_model" in outcomes["unknown tokenizer"]
    assert "evaluate.sentence_model could not be built" in outcomes["unknown sentence model"]
