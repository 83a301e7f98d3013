"""Pages that the site takes from the repository, and links that lead out of ``docs``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# README and others stay where people look for them; the site has them under these names.
TAKEN = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
NOTEBOOK = "examples/convert.ipynb"
PLACEHOLDER = "fastst.example"  # in the place of addresses that the project has not got yet
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Send nobody to an address that is none yet."""
    for name in ("site_url", "repo_url"):
        if PLACEHOLDER in (config[name] or ""):
            config[name] = None
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    for page, source in TAKEN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "notebook.md", content=_notebook()))
    return files


def _notebook() -> str:
    """The notebook as a page: its texts and its code."""
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    parts = [
        source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for cell in cells
        for source in ["".join(cell["source"])]
    ]
    title, *rest = parts
    where = f"[The notebook](../{NOTEBOOK}) itself lies in the repository."
    return "\n\n".join([title, where, *rest])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn paths of the repository into paths of the site, or into links to the source; where the
    source has no address, into what they are called and where they lie."""
    source = TAKEN.get(page.file.src_uri)
    here = Path() if source else Path("docs") / Path(page.file.src_uri).parent
    back = "../" * (len(Path(page.file.src_uri).parts) - 1)
    pages = {v: k for k, v in TAKEN.items()}

    def lead(match: re.Match[str]) -> str:
        label, path, anchor = match[1], _normal(here / match[2]), match[3] or ""
        if not (ROOT / path).exists():
            return match[0]  # mkdocs says so
        if path in pages:
            target = back + pages[path]
        elif path.startswith("docs/"):
            target = back + path.removeprefix("docs/")
        elif config["repo_url"]:
            target = f"{config['repo_url']}/blob/main/{path}"
        else:
            return label if label == path else f"{label} (`{path}`)"
        return f"[{label}]({target}{anchor})"

    return _LINK.sub(lead, markdown)


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.as_posix().split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
