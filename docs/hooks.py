"""mkdocs hooks: pages and pictures of the repository that lie outside docs/ become part of the site.

The pages link to files as they lie in the repository, so that the links work there too. For the site, a link to a
file that is on it becomes a link between its pages, and a link to any other file becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# File of the repository -> its page on the site.
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
_PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the pictures that any page shows."""
    from mkdocs.structure.files import File

    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    shown = {picture for file in files if file.is_documentation_page() for picture in _pictures(file)}
    for picture in sorted(shown):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository into links of the site."""
    here = page.file.src_uri

    def replace(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or ":" in target:
            return found[0]
        uri = _site_uri(_in_repository(here, target))
        if uri is None or files.get_file_from_path(uri) is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(replace, markdown)


def _in_repository(page: str, target: str) -> str:
    """Where a link on a page of the site leads, as a path in the repository."""
    source = next((source for source, uri in PAGES.items() if uri == page), f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _site_uri(path: str) -> str | None:
    """Where a file of the repository is on the site; None where it is not."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(_PICTURES) else None


def _pictures(file: Any) -> set[str]:
    """Pictures outside docs/ that a page shows, as paths in the repository."""
    targets = (_in_repository(file.src_uri, found[3]) for found in LINK.finditer(file.content_string) if found[1])
    return {path for path in targets if path.endswith(_PICTURES) and not path.startswith("docs/")}
