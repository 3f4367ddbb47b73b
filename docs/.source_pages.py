"""MkDocs hook: links to files of the repository (`../dinov2/config.py`) lead to pages of the site with their text."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".ipynb": "json", ".md": "markdown"}
MODEL_CARD = Path("MODEL_CARD.md")  # a page of the site, in its navigation
LINK = re.compile(r"(?<=\]\()((?:\.\./)+)([^)#\s]+)(?=[)#])")


def target_of(page: str, link: str) -> Path | None:
    """The repository file outside docs/ that a link on a page (path within docs/) leads to; None if it is none."""
    path = Path(os.path.normpath(Path("docs", page).parent / link))
    return path if (ROOT / path).is_file() and path.parts[0] not in ("docs", "..") else None


def page_name(path: Path) -> str:
    """Where the site has the text of a repository file."""
    return f"source/{path}" if path == MODEL_CARD else f"source/{path}.md"


def page_text(path: Path) -> str:
    """Markdown that shows a repository file; left out of the search."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path != MODEL_CARD:
        text = f"# {path}\n\n``````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n``````\n"
    return f"---\nsearch:\n  exclude: true\n---\n{text}"


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page for each repository file that a page links to."""
    targets = {MODEL_CARD}
    for file in files.documentation_pages():
        links = ("".join(found) for found in LINK.findall(file.content_string))
        targets |= {target for link in links if (target := target_of(file.src_uri, link))}
    for target in sorted(targets):
        inclusion = InclusionLevel.INCLUDED if target == MODEL_CARD else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, page_name(target), content=page_text(target), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point links to repository files at their pages."""

    def replaced(match: re.Match[str]) -> str:
        target = target_of(page.file.src_uri, match[0])
        return match[0] if target is None else os.path.relpath(page_name(target), Path(page.file.src_uri).parent)

    return LINK.sub(replaced, markdown)
