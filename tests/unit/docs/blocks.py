"""The code blocks of the documentation, with what is said about running them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w*)(?P<title>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block. `mark` is the comment right above it: `not run: WHY`, `run: lab` or empty."""

    page: str
    line: int
    language: str
    title: str
    mark: str
    text: str

    @property
    def skipped(self) -> bool:
        return self.mark.startswith("not run: ")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page that people write; those under reference/ are written by docs/reference.py."""
    return sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "reference")


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["title"])
        line = text.count("\n", 0, match.start("language")) + 1
        page = str(path.relative_to(DOCS))
        found.append(
            Block(page, line, match["language"], title[1] if title else "", match["mark"] or "", match["text"])
        )
    return found


def all_blocks() -> list[Block]:
    return [block for path in pages() for block in blocks_of(path)]
