"""Reading Markdown pages: code blocks, links, anchors."""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^\1```", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: as the fence says.
        title: likewise, "" without one.
        text: the content.
        line: where it begins, counted from 1.
    """

    language: str
    title: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every page that people read in a checkout."""
    return sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("results/*.md")])


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a language, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        indent, named, title, content = match.groups()
        if named == language:
            content = re.sub(f"^{indent}", "", content, flags=re.M)
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(named, title or "", content, line))
    return found


def links(page: Path) -> list[str]:
    """The targets of all links, pictures and sounds outside of code and comments."""
    text = re.sub(r"`[^`\n]*`", "code", COMMENT.sub("", FENCE.sub("", page.read_text())))
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text) + re.findall(r' src="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text()), re.M)
    return {_slug(re.sub(r"[`*]", "", head)) for head in heads}


def _slug(head: str) -> str:
    """A heading's anchor, as Markdown's table of contents makes it."""
    ascii_only = unicodedata.normalize("NFKD", head).encode("ascii", "ignore").decode()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
