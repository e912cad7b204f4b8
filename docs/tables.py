"""Writes the tables of README.md from the code: `python docs/tables.py`. A test checks that they are up to date."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_rl.api.keywords import Keyword, keywords
from nemo_rl.data.shapes import ACCEPTED

README = Path(__file__).parent.parent / "README.md"
TITLES = {
    "training": "All algorithms",
    "grpo": "GRPO",
    "reward": "The reward (GRPO)",
    "rollout": "Rollouts by vLLM (GRPO)",
    "dpo": "DPO",
    "sft": "SFT",
    "dataset": "Data sets of the hub",
    "resources": "On a cluster: resources",
    "output": "On a cluster: output",
    "": "On a cluster: pods",
}
ROOM = {"rollout": "rollout"}
"""Fields of the job itself that are told beside a section."""


def shapes_table() -> str:
    """One row per accepted shape of each algorithm, with one row of data as example."""
    lines = ["| Algorithm | Shape | One row |", "| --- | --- | --- |"]
    for algorithm, shapes in ACCEPTED.items():
        lines += [f"| {algorithm.upper()} | {name} | `{_cell(example)}` |" for name, example in shapes]
    return "\n".join(lines)


def keywords_table() -> str:
    """One row per keyword, in sections: name, YAML path, what it means and its default."""
    lines = []
    homes = [home for all_homes in keywords().values() for home in all_homes]
    for section, title in TITLES.items():
        lines += ["", f"**{title}**", "", "| Keyword | YAML | Meaning |", "| --- | --- | --- |"]
        lines += [_keyword_row(home) for home in homes if section == (home.section or ROOM.get(home.name, ""))]
    return "\n".join(lines).strip()


def _keyword_row(home: Keyword) -> str:
    path = f"{home.section}.{home.info.alias}" if home.section else home.info.alias
    return f"| `{home.name}` | `{path}` | {_cell(home.info.description)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def with_tables(readme: str) -> str:
    """The text of README.md with both tables as they should be."""
    for name, table in (("shapes", shapes_table()), ("keywords", keywords_table())):
        begin, end = f"<!-- {name}: written by docs/tables.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        readme, count = pattern.subn(lambda _, b=begin, t=table, e=end: f"{b}\n\n{t}\n\n{e}", readme)
        if count != 1:
            raise SystemExit(
                f"{README.name}: found {count} places for the table {name}; expected one between {begin} and {end}"
            )
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
