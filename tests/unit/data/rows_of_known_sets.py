"""Hand-made rows with the real columns of the known data sets."""

from __future__ import annotations

from typing import Any


def scored(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
    scores = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **scores}


MULTI_TURN = "Name a colour.\n<extra_id_1>Assistant\nRed.\n<extra_id_1>User\nAnother one, please."
MULTI_TURN_MESSAGES = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another one, please."},
]

# The two responses of a prompt are not neighbours here, one prompt has three, one has one, one has a tie.
HELPSTEER2 = [
    scored("c#", "A language by Microsoft.", 3),
    scored(MULTI_TURN, "Blue.", 4),
    scored("What is DNA?", "A molecule.", 2),
    scored("c#", "I do not know.", 0),
    scored("What is DNA?", "It carries genes.", 2),
    scored(MULTI_TURN, "Red.", 1),
    scored("Sort a list.", "Use sorted().", 2),
    scored("Sort a list.", "Use list.sort() or sorted().", 4),
    scored("Sort a list.", "No.", 0),
    scored("Say hi.", "Hi!", 4),
]


def preferred(prompt: str, first: str, second: str, strength: int, split: str = "train") -> dict[str, Any]:
    return {
        "split": split,
        "prompt": prompt,
        "response_1": first,
        "response_2": second,
        "preference_strength": strength,
        "preference_statement": "One response is better.",
        "preference_elaboration": "It answers the question.",
        "three_most_similar_preferences": [],
        "all_preferences_unprocessed": [{"strength": strength}],
    }


HELPSTEER2_PREFERENCE = [
    preferred("c#", "A language.", "No idea.", -2),
    preferred(MULTI_TURN, "Red.", "Blue.", 3),
    preferred("What is DNA?", "A molecule.", "Genes.", 0),
    preferred("Held back", "Yes.", "No.", 1, split="val"),
]

OPENMATH = [
    {
        "problem": "What is 2+2?",
        "generated_solution": "Two and two are \\boxed{4}.",
        "expected_answer": "4",
        "problem_source": "augmented_gsm8k",
    },
    {
        "problem": "What is 3*3?",
        "generated_solution": "Three times three is \\boxed{9}.",
        "expected_answer": "9",
        "problem_source": "math",
    },
]
