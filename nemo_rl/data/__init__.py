"""Training data: reading rows, recognising their shape, turning them into tokens and loss masks.

Importing this package loads neither torch nor transformers nor datasets; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.data.chat import encode_pair, encode_prompt, encode_text
    from nemo_rl.data.examples import Examples, PairExample, PromptExample, TextExample
    from nemo_rl.data.formats import to_preference_rows, to_prompt_rows, to_text_rows
    from nemo_rl.data.loading import load_rows
    from nemo_rl.data.module import DataModule, train_and_validation
    from nemo_rl.data.prepare import Prepared, batches, describe_example
    from nemo_rl.data.rows import PreferenceRow, PromptRow, Report, TextRow

_HOMES = {
    "nemo_rl.data.chat": ("encode_pair", "encode_prompt", "encode_text"),
    "nemo_rl.data.formats": ("to_preference_rows", "to_prompt_rows", "to_text_rows"),
    "nemo_rl.data.loading": ("load_rows",),
    "nemo_rl.data.module": ("DataModule", "train_and_validation"),
    "nemo_rl.data.examples": ("Examples", "PairExample", "PromptExample", "TextExample"),
    "nemo_rl.data.prepare": ("Prepared", "batches", "describe_example"),
    "nemo_rl.data.rows": ("PreferenceRow", "PromptRow", "Report", "TextRow"),
}
_HOME_OF = {name: home for home, exported in _HOMES.items() for name in exported}

# The function `prepare` is left to its module: once that is imported, the name means the module here.
__all__ = [
    "DataModule",
    "Examples",
    "PairExample",
    "PreferenceRow",
    "Prepared",
    "PromptExample",
    "PromptRow",
    "Report",
    "TextExample",
    "TextRow",
    "batches",
    "describe_example",
    "encode_pair",
    "encode_prompt",
    "encode_text",
    "load_rows",
    "to_preference_rows",
    "to_prompt_rows",
    "to_text_rows",
    "train_and_validation",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
