"""Adapters of nvidia/HelpSteer2: five scores for each response, or two responses with a preference.

See https://huggingface.co/datasets/nvidia/HelpSteer2. Earlier turns are written inside the prompt string, behind
`<extra_id_1>User` and `<extra_id_1>Assistant` markers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nemo_rl.data.columns import last_user_turn, reward_columns, text
from nemo_rl.data.rows import Message, PreferenceRow, PromptRow, Row, TextRow

SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SCORED_COLUMNS = frozenset({"prompt", "response", *SCORES})
PREFERENCE_COLUMNS = frozenset({"prompt", "response_1", "response_2", "preference_strength"})
# Nothing that tells of the responses may reach a reward: neither they nor what people wrote about them.
_HIDDEN = (
    SCORED_COLUMNS
    | PREFERENCE_COLUMNS
    | {"split", "preference_statement", "preference_elaboration", "all_preferences_unprocessed"}
)
# Where the tokenizer has no chat template, one newline stands between prompt and response.
SEPARATOR = "\n"

_MARKER = re.compile(r"\n?<extra_id_[01]>(User|Assistant|System)(?:\n|$)")


def parse_turns(prompt: str) -> list[Message]:
    """The turns of a prompt string; one user message where it has no markers. A trailing empty turn is left out."""
    pieces = _MARKER.split(prompt)
    turns = [{"role": "user", "content": pieces[0]}] if pieces[0].strip() or len(pieces) == 1 else []
    turns += [
        {"role": role.lower(), "content": content} for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if len(turns) > 1 and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _prompt(string: str) -> str | list[Message]:
    return parse_turns(string) if _MARKER.search(string) else string


def prompts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[PromptRow]:
    """Each prompt once, without the responses and their scores."""
    found: dict[str, PromptRow] = {}
    for row in rows:
        string = text(row, "prompt")
        if string is None:
            dropped["without a prompt"] += 1
        elif string in found:
            dropped["repeating a prompt"] += 1
        else:
            turns = _prompt(string)
            found[string] = PromptRow(
                prompt=string if isinstance(turns, str) else last_user_turn(turns) or string,
                messages=None if isinstance(turns, str) else turns,
                columns=reward_columns(row, columns, _HIDDEN),
                separator=SEPARATOR,
            )
    return list(found.values())


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _scored_groups(rows: Sequence[Row], dropped: Counter[str]) -> dict[str, list[tuple[float, str]]]:
    """(helpfulness, response) of each prompt, grouped by equal prompt so that row order does not matter."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        prompt, response = text(row, "prompt"), text(row, "response")
        if prompt is None or response is None:
            dropped["without a prompt or a response"] += 1
        elif not _number(row.get("helpfulness")):
            dropped["without a helpfulness score"] += 1
        else:
            groups.setdefault(prompt, []).append((float(row["helpfulness"]), response))
    return groups


def scored_texts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[TextRow]:
    """The most helpful response of each prompt; the first of equals."""
    found = []
    for prompt, group in _scored_groups(rows, dropped).items():
        dropped["not the best response of their prompt"] += len(group) - 1
        best = max(group, key=lambda scored: scored[0])
        found.append(TextRow(prompt=_prompt(prompt), completion=best[1], separator=SEPARATOR))
    return found


def scored_preferences(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[PreferenceRow]:
    """The most against the least helpful response of each prompt; prompts without a difference are left out."""
    found = []
    for prompt, group in _scored_groups(rows, dropped).items():
        best = max(group, key=lambda scored: scored[0])
        worst = min(group, key=lambda scored: scored[0])
        if len(group) == 1:
            dropped["with one response only"] += 1
        elif best[0] == worst[0] or best[1] == worst[1]:
            dropped["in a tie"] += len(group)
        else:
            dropped["merged into the pair of their prompt"] += len(group) - 1
            found.append(PreferenceRow(_prompt(prompt), best[1], worst[1], separator=SEPARATOR))
    return found


def _training_split(rows: Sequence[Row], dropped: Counter[str]) -> list[Row]:
    """The hub's one split holds both; where a column tells them apart, only the training part is trained on."""
    if {"train", "val"} <= {row.get("split") for row in rows}:
        kept = [row for row in rows if row.get("split") != "val"]
        dropped["of the validation part"] += len(rows) - len(kept)
        return kept
    return list(rows)


def preference_prompts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[PromptRow]:
    """Each prompt once, without the responses and the preference."""
    return prompts(_training_split(rows, dropped), columns, dropped)


def preferences(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[PreferenceRow]:
    """The preferred response first: the first one below a strength of 0, the second one above; 0 is a tie."""
    found = []
    for row in _training_split(rows, dropped):
        prompt, first, second = text(row, "prompt"), text(row, "response_1"), text(row, "response_2")
        strength: Any = row.get("preference_strength")
        if prompt is None or first is None or second is None:
            dropped["without a prompt or a response"] += 1
        elif not _number(strength):
            dropped["without a preference"] += 1
        elif strength == 0 or first == second:
            dropped["in a tie"] += 1
        else:
            chosen, rejected = (first, second) if strength < 0 else (second, first)
            found.append(PreferenceRow(_prompt(prompt), chosen, rejected, separator=SEPARATOR))
    return found


def preference_texts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[TextRow]:
    """The preferred response of each pair."""
    return [
        TextRow(prompt=pair.prompt, completion=pair.chosen, separator=SEPARATOR)
        for pair in preferences(rows, columns, dropped)
    ]
