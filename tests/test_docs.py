"""The documentation fits the tree: links work, the navigation is complete, generated pages are up to date.

Building the site (`make docs`) needs mkdocs; these tests do not.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import vlv
from docs import generate, hooks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "mlflow/*.md", "pretrained/**/*.md")
    for path in ROOT.glob(pattern)
)
# Made by commands, so missing in a fresh clone.
_MADE = ("mlflow/store",)
_NO_FILE = {"vlv/full-train"}  # a Prefect deployment
_PLACEHOLDER = re.compile(r"\b[A-Z]+\b(?!\.md)")  # as in configs/NAME.yaml
_FILE = re.compile(r"`((?:vlv|flows|tests|configs|docs|mlflow|benchmarks|notebooks|pretrained)/[\w./-]*)(?:::\w+)?`")


def _text(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _links(path: Path) -> Iterator[tuple[str, str]]:
    """Relative links of a page: file, anchor."""
    for found in hooks.LINK.finditer(_text(path)):
        if ":" not in found[3]:
            yield found[3], (found[4] or "").removeprefix("#")


def _anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and git hosts make them."""
    headings = re.findall(r"^#+ (.+)$", _text(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    wrong = []
    for page in _PAGES:
        for target, anchor in _links(page):
            file = (page.parent / target).resolve() if target else page
            if not file.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
                wrong.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert wrong == []


def test_files_that_pages_name_exist() -> None:
    wrong = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in _PAGES
        if page.name != "CHANGELOG.md"  # it describes the past
        for name in _FILE.findall(_text(page))
        if name not in _NO_FILE
        and not name.startswith(_MADE)
        and not _PLACEHOLDER.search(name)
        and not (ROOT / name).exists()
    ]
    assert wrong == []


def _nav(value: Any) -> Iterator[str]:
    for entry in value:
        for page in entry.values():
            yield from [page] if isinstance(page, str) else _nav(page)


def test_the_navigation_has_every_page_once() -> None:
    nav = list(_nav(_settings()["nav"]))
    assert len(nav) == len(set(nav))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(hooks.PAGES.values())
    assert set(nav) == there
    assert [source for source in hooks.PAGES if not (ROOT / source).is_file()] == []


def test_the_site_loads_nothing_from_other_hosts() -> None:
    settings = _settings()
    assert settings["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript"} & settings.keys()
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_generated_pages_are_up_to_date() -> None:
    old = [name for name, text in generate.pages().items() if (generate.REFERENCE / name).read_text("utf-8") != text]
    assert old == [], "write them with: python -m docs.generate"


def test_every_key_and_every_option_is_described() -> None:
    for text in generate.pages().values():
        rows = [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]
        assert [row for row in rows if ".kind` |" not in row] == []


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (
        (cited["version"], cited["license"])
        == (project["version"], project["license"])
        == (vlv.__version__, "Apache-2.0")
    )
    assert cited["preferred-citation"]["url"].endswith("2507.07104")


def test_hooks_turn_links_of_the_repository_into_links_of_the_site() -> None:
    class Files:
        def get_file_from_path(self, uri: str) -> str | None:
            return uri if uri in {"train.md", "project/contributing.md", "plots/a.png"} else None

    class Page:
        class file:
            src_uri = "project/contributing.md"

    text = (
        "[a](docs/train.md#x) [b](CONTRIBUTING.md) ![c](plots/a.png) [d](vlv/config/models.py) [e](https://x.y) [f](#g)"
    )
    turned = hooks.on_page_markdown(text, Page, None, Files())
    assert turned == "[a](../train.md#x) [b](contributing.md) ![c](../plots/a.png) d [e](https://x.y) [f](#g)"


def _settings() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return value
