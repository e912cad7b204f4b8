"""The accepted shapes of a data set, with one example row each: what the error for a wrong data set shows."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rl.errors import DatasetError

_MESSAGES = '{"messages": [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}]}'
_SHAREGPT = '{"conversations": [{"from": "human", "value": "2+2=?"}, {"from": "gpt", "value": "4"}]}'
_HELPSTEER2 = (
    '{"prompt": "Hi", "response": "Hello!", '
    '"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}'
)
_HELPSTEER2_PREFERENCE = (
    '{"split": "train", "prompt": "Hi", "response_1": "Hello!", "response_2": "What?", "preference_strength": -2}'
)
_OPENMATH = '{"problem": "2+2=?", "generated_solution": "Two and two are 4.", "expected_answer": "4"}'

ACCEPTED: dict[str, tuple[tuple[str, str], ...]] = {
    "grpo": (
        ("prompt, and any columns for the reward", '{"prompt": "2+2=", "answer": "4"}'),
        ("question (or problem, instruction, input)", '{"question": "2+2=?", "answer": "4"}'),
        ("messages; a final assistant turn becomes the column completion", _MESSAGES),
        ("conversations (ShareGPT)", _SHAREGPT),
        ("prompt + completion; the completion is a column for the reward", '{"prompt": "2+2=", "completion": "4"}'),
        ("nvidia/HelpSteer2", _HELPSTEER2),
        ("nvidia/OpenMathInstruct-2", _OPENMATH),
    ),
    "sft": (
        ("messages", _MESSAGES),
        ("conversations (ShareGPT)", _SHAREGPT),
        ("prompt + completion", '{"prompt": "2+2=", "completion": "4"}'),
        (
            "question (or problem, instruction, input, prompt) + answer (or solution, output, response)",
            '{"question": "2+2=?", "answer": "4"}',
        ),
        ("text", '{"text": "Two and two are four."}'),
        ("chosen/rejected; the chosen answer is trained", '{"prompt": "2+2=", "chosen": "4", "rejected": "5"}'),
        ("nvidia/HelpSteer2; the best response of each prompt", _HELPSTEER2),
        ("nvidia/OpenMathInstruct-2", _OPENMATH),
    ),
    "dpo": (
        ("prompt + chosen + rejected", '{"prompt": "2+2=", "chosen": "4", "rejected": "5"}'),
        (
            "chosen + rejected conversations that share their beginning",
            '{"chosen": [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "4"}], '
            '"rejected": [{"role": "user", "content": "2+2=?"}, {"role": "assistant", "content": "5"}]}',
        ),
        ("nvidia/HelpSteer2; best against worst response of each prompt", _HELPSTEER2),
        ("nvidia/HelpSteer2 with data_dir preference", _HELPSTEER2_PREFERENCE),
    ),
}


def unknown_shape(algorithm: str, columns: Sequence[str], empty: Sequence[str] = ()) -> DatasetError:
    """The error for rows whose columns fit no shape that the algorithm can train on. `empty` hold no value in any row."""
    without = f"; {', '.join(map(repr, empty))} there, but with no value in any row" if empty else ""
    shapes = "\n".join(f"  - {name}\n      {example}" for name, example in ACCEPTED[algorithm])
    cure = "Rename or map the columns to one of them."
    if len(columns) == 1 and any(separator in str(columns[0]) for separator in ",;\t|"):
        cure = "All names stand in one cell: the cells of a .tsv are separated by tabs, others belong into a .csv."
    return DatasetError(
        f"found the columns {', '.join(map(repr, columns)) or '(none with a value)'}{without}; expected, for {algorithm}, one "
        "of "
        f"these shapes (one row of each):\n{shapes}\n{cure}"
    )
