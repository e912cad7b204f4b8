from __future__ import annotations

import subprocess
import sys

import pytest

import nemo_rl.data

SCRIPT = """
import sys
import nemo_rl.data
from nemo_rl.data import DataModule, load_rows, to_prompt_rows
heavy = {"torch", "transformers", "datasets", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_package_and_reading_rows_loads_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


@pytest.mark.parametrize("name", nemo_rl.data.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(nemo_rl.data, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nemo_rl.data.nothing
