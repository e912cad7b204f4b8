"""Writes every generated file anew, and says which changed: `python tests/generated.py`.

In order: the definition from the models, its copy in the chart, the Kustomize base from the chart (where helm is at hand),
the types of keywords, the tables of the README, the reference pages, what fits which GPUs (by the estimate, which takes a
while).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CRD = "nemo-rl.io_rltrainingjobs.yaml"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def definition() -> dict[Path, str]:
    from nemo_rl.job.crd import crd_yaml

    text = crd_yaml()
    return {ROOT / "crds" / CRD: text, ROOT / "charts/nemo-rl-operator/files" / CRD: text}


def kustomize() -> dict[Path, str]:
    generate = load(ROOT / "deploy/generate.py")
    try:
        program = generate.helm()
    except FileNotFoundError as error:
        print(f"deploy/base was left as it is: {error}")
        return {}
    return {generate.BASE / name: text for name, text in generate.files(program).items()}


def tables() -> dict[Path, str]:
    readme = ROOT / "README.md"
    return {readme: load(ROOT / "docs/tables.py").with_tables(readme.read_text(encoding="utf-8"))}


def typed() -> dict[Path, str]:
    module = load(ROOT / "docs/typed.py")
    return {module.FILE: module.text()}


def reference() -> dict[Path, str]:
    module = load(ROOT / "docs/reference.py")
    return {module.FOLDER / name: text for name, text in module.pages().items()}


def what_fits() -> dict[Path, str]:
    module = load(ROOT / "docs/what_fits.py")
    return {module.PAGE: module.page()}


def main() -> None:
    for part in (definition, kustomize, typed, tables, reference, what_fits):
        for path, text in part().items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
