"""What mkdocs does with a page before it becomes HTML: macros, and links that leave docs/.

A link to another file of the repository becomes one to the code host; a picture from there is
copied into the site. A macro that fails, or a link to nothing, fails the build.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jinja2

from docs import figures, recipe_keys

log = logging.getLogger("mkdocs.hooks")  # what it warns of fails a strict build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]*)")
PICTURES = (".png", ".webp", ".jpg", ".svg")
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"][
    "Repository"
]


def environment() -> jinja2.Environment:
    """Jinja with the macros of `figures` and `recipe_keys`; whatever is not defined is an error."""
    made = jinja2.Environment(
        undefined=jinja2.StrictUndefined, finalize=_printable, keep_trailing_newline=True
    )
    made.globals.update({macro.__name__: macro for macro in figures.MACROS})
    made.globals.update(keys=recipe_keys.keys, recipe_reference=recipe_keys.reference)
    made.globals.update(include_file=_include)
    made.filters["digits"] = figures.digits
    return made


def _printable(value: Any) -> Any:
    if type(value) is float:
        raise TypeError(f"{value} has no number of digits: add `| digits(2)`")
    return value


def _include(path: str) -> str:
    """A page that stands at the root of the repository, with its links as seen from docs/."""
    text = (ROOT / path).read_text("utf-8")
    return re.sub(r"(\]\()(?!https?:|#|mailto:)", r"\1../", text)


ENVIRONMENT = environment()


def render(text: str) -> str:
    """A page's Markdown with its macros replaced."""
    return ENVIRONMENT.from_string(text).render()


def on_config(config: Any) -> Any:
    """Take the repository's address from pyproject.toml, so that it stands in one place."""
    config.repo_url, config.repo_name = REPOSITORY, "Source"
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the macros, then the links that leave docs/."""
    folder = (DOCS / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[1]))
        if not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, match[1])
            return match[1]
        inside = _inside(target, config, files)
        if inside is None:
            kind = "tree" if target.is_dir() else "blob"
            return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
        return Path(os.path.relpath(inside, folder)).as_posix()

    try:
        markdown = render(markdown)
    except Exception as error:  # whatever a macro raises, with the page that calls it
        log.error("%s: %s: %s", page.file.src_uri, type(error).__name__, error)
    return LINK.sub(replaced, markdown)


def _inside(target: Path, config: Any, files: Any) -> Path | None:
    """Where the site has this file; pictures of the repository are added to it."""
    from mkdocs.structure.files import File

    if target.is_relative_to(DOCS):
        return target
    name = target.relative_to(ROOT).as_posix()
    if name in PAGES:
        return DOCS / PAGES[name]
    if target.suffix not in PICTURES:
        return None
    if files.get_file_from_path(f"pictures/{name}") is None:
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(target)))
    return DOCS / "pictures" / name
