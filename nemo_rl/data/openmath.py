"""Adapter of nvidia/OpenMathInstruct-2: problems with generated solutions and expected answers.

See https://huggingface.co/datasets/nvidia/OpenMathInstruct-2. The expected answers of augmented problems are majority
votes, so some are wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nemo_rl.data.columns import reward_columns, text
from nemo_rl.data.rows import PromptRow, Row, TextRow
from nemo_rl.data.spool import Spool, like

COLUMNS = frozenset({"problem", "generated_solution", "expected_answer"})
# Where the tokenizer has no chat template, one newline stands between problem and solution.
SEPARATOR = "\n"


def prompts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[PromptRow] | Spool[PromptRow]:
    """The problems; the reward sees the expected answer (also as `answer`), never the generated solution."""
    found = like(rows)
    for row in rows:
        problem = text(row, "problem")
        if problem is None:
            dropped["without a problem"] += 1
        elif row.get("expected_answer") is None:
            dropped["without an expected answer"] += 1
        else:
            visible = reward_columns(row, columns, {"generated_solution"})
            visible.setdefault("answer", row["expected_answer"])
            found.append(PromptRow(problem, columns=visible, separator=SEPARATOR))
    return found


def texts(rows: Sequence[Row], columns: Sequence[str], dropped: Counter[str]) -> list[TextRow] | Spool[TextRow]:
    """The generated solution of each problem."""
    found = like(rows)
    for row in rows:
        problem, solution = text(row, "problem"), text(row, "generated_solution")
        if problem is None or solution is None:
            dropped["without a problem or a solution"] += 1
        else:
            found.append(TextRow(problem, solution, separator=SEPARATOR))
    return found
