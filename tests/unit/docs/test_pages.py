"""The pages are true: the site builds without a warning, the reference is what the code says, messages are real ones."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from charts import ROOT
from generated import load

DOCS = ROOT / "docs"


def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "index.html").exists()
    notebook = (tmp_path / "site" / "on_a_cluster" / "index.html").read_text()
    assert "nemo-rl: Succeeded: training ended" in notebook
    assert notebook.count("<progress") >= 6
    assert "&lt;progress" not in notebook
    assert "```" not in notebook
    remote = re.findall(
        r'<(?:script|link)[^>]*(?:src|href)="(https?://[^"]+)"', (tmp_path / "site/index.html").read_text()
    )
    assert [url for url in remote if "canonical" not in url] == [], "a page asks another server"


def test_the_reference_is_what_the_code_says():
    pages = load(DOCS / "reference.py").pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")}
    assert there == pages, "run python docs/reference.py"


def test_pictures_are_light_and_ask_no_other_server():
    """`make pictures` makes them."""
    found = {path.name: path.read_bytes() for path in (DOCS / "assets").iterdir()}
    pictures = {name for names in load(DOCS / "pictures.py").KEPT.values() for name in names}
    assert pictures <= set(found)
    assert sum(map(len, found.values())) < 600_000
    assert max(map(len, found.values())) < 150_000
    for name in pictures:
        if name.endswith(".svg"):
            urls = re.findall(rb"""(?:src|href)=["'](https?:[^"']+)|url\((?!#)([^)]+)""", found[name])
            assert urls == [], name
            assert b"/tmp/" not in found[name], f"{name} shows a place of the machine that made it"
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    shown = {
        Path(place).name for page in pages for place in re.findall(r"\]\(([\w./-]+\.(?:svg|png))\)", page.read_text())
    }
    assert pictures <= shown


def test_every_keyword_has_an_address():
    from nemo_rl.api.keywords import keywords

    found = re.findall(r'<a id="([\w-]+)"></a>', (DOCS / "reference" / "keywords.md").read_text(encoding="utf-8"))
    assert set(keywords()) <= set(found)
    assert len(found) == len(set(found))


def test_every_method_of_a_job_is_documented():
    from nemo_rl.backends.kubernetes.job import Job

    found = re.findall(
        r"^\*\*`Job\.(\w+)\(", (DOCS / "reference" / "python.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    methods = {name for name, member in vars(Job).items() if inspect.isfunction(member) and not name.startswith("_")}
    assert {"status", "logs", "result", "cancel"} <= methods
    assert set(found) == methods


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    missing = [str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in text]
    assert missing == []


@functools.cache
def messages_of_the_code() -> list[str]:
    """Every text in the code, with … for each part that is filled in."""
    found = []
    files = [*(ROOT / "nemo_rl").rglob("*.py"), *(ROOT / "operator").rglob("*.py")]
    files.append(ROOT / "charts/nemo-rl-operator/files/helm_test.py")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}", "…", node.value))
    policy = (ROOT / "charts/nemo-rl-operator/templates/admissionpolicy.yaml").read_text()
    return [*found, re.sub(r"\{\{.*?\}\}", "…", " ".join(policy.split()))]


def rows() -> list[str]:
    """The first cell of each row of the tables of troubleshooting.md, but for those that Helm says."""
    cells = re.findall(r"^\| (`.*?) \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [cell for cell in cells if "(Helm)" not in cell]


@pytest.mark.parametrize("cell", rows())
def test_a_message_in_the_troubleshooting_table_is_one_of_the_code(cell: str):
    texts = messages_of_the_code()
    for message in re.findall(r"`([^`]+)`", cell):
        if message == "helm test":
            continue
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 3]
        pattern = ".*?".join(re.escape(part) for part in parts)
        assert any(re.search(pattern, text) for text in texts), message


def test_values_named_in_pages_are_values_of_the_chart():
    known = {path for path, _, _ in load(DOCS / "reference.py").values()}
    sections = {path.split(".")[0] for path in known}
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if path.parent.name != "reference")
    named = {name for name in re.findall(r"`([a-z]\w+(?:\.\w+)+)", text) if name.split(".")[0] in sections}
    fields = {f"resources.{n}" for n in ("memory", "ephemeralStorage", "extra", "gpuResource", "claims")}  # of a job
    fields |= {"metrics.jsonl"}
    assert len(named) > 6
    assert {n for n in named if n not in known} - fields == set()


def test_the_page_for_administrators_gives_each_value_its_default_and_a_reason():
    values = load(DOCS / "reference.py").values()
    sections = {path.rpartition(".")[0] for path, _, _ in values}
    defaults = {path: json.dumps(default) for path, default, _ in values if path not in sections}
    page = (DOCS / "howto/administrator.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*)` \| (\S.{10,}) \|$", page, re.MULTILINE)
    assert {path: default for path, default, _ in rows} == defaults
    assert len(rows) == len(defaults), "each once"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "examples/README.md"])
def test_files_that_a_page_names_are_there(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = ("nemo_rl", "operator", "tests", "docs", "charts", "examples", "trainer_image", "deploy", ".ci")
    named = {word for word in re.findall(r"`([\w./-]+)`", text) if word.split("/")[0] in folders and "/" in word}
    assert named or page == "README.md"
    assert [word for word in sorted(named) if not (ROOT / word).exists()] == []


def test_make_has_the_commands_that_pages_name():
    targets = set(re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {word for target in targets for word in target.split()}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = {w for w in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)}
        assert named <= known, page
