"""The six documented examples of the README, and tiny models and data sets for the names in them."""

from __future__ import annotations

import ast
import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ("Minimal GRPO", "SFT", "DPO", "Your own prompts", "Callbacks", "Full configuration")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_language_model(folder: Path, chat: bool) -> None:
    """A tiny Qwen2 model over bytes. The end token is made likely, so that untrained completions end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|im_end|>" if chat else "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    if chat:
        fast.chat_template = CHATML
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=vocabulary[end],
            pad_token_id=0,
            bos_token_id=None,
        )
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            # equal logits but for the end token, which a constant part of the hidden state raises
            model.model.norm.weight.mul_(0.2)
            model.lm_head.weight[vocabulary[end]] += 8 * model.lm_head.weight.std()
    model.save_pretrained(folder)


def write_rows(folder: Path, split: str, rows: list[dict[str, object]]) -> None:
    """A local data set with one split, read by datasets.load_dataset like one of the hub."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = f"configs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")


def helpsteer2(count: int) -> list[dict[str, object]]:
    draw = random.Random(0)
    rows: list[dict[str, object]] = []
    for i in range(count):
        for j in range(2):
            scores = {name: draw.randint(0, 4) for name in ("correctness", "coherence", "complexity", "verbosity")}
            response = f"Answer {j} to question {i}."
            rows.append({"prompt": f"Question {i}?", "response": response, "helpfulness": (i + 2 * j) % 5, **scores})
    return rows


def openmath(count: int) -> list[dict[str, object]]:
    return [
        {
            "problem": f"What is {i} + 1?",
            "generated_solution": f"It is \\boxed{{{i + 1}}}.",
            "expected_answer": str(i + 1),
            "problem_source": "augmented_math",
        }
        for i in range(count)
    ]


def example(heading: str) -> str:
    """The code of an example, as it stands in the README."""
    section = re.split(r"^#+ ", README.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match, heading
    return match[1]


def with_files(code: str, folder: str = "") -> str:
    """The example with files in place of the data sets' names, which need a hub; nothing else is changed."""
    code = code.replace('"nvidia/HelpSteer2"', f'"{folder}helpsteer2.jsonl"')
    return re.sub(
        r'"nvidia/OpenMathInstruct-2"(.*?)\n *split="train_1M",', rf'"{folder}openmath.jsonl"\1', code, flags=re.DOTALL
    )


def write_data(folder: Path) -> None:
    """The files of `with_files`, and the rows of "Your own prompts" as prompts.jsonl."""
    assigned = {
        ast.unparse(node.targets[0]): node.value
        for node in ast.parse(example("Your own prompts")).body
        if isinstance(node, ast.Assign)
    }
    found = {"helpsteer2": helpsteer2(24), "openmath": openmath(48), "prompts": ast.literal_eval(assigned["prompts"])}
    for name, rows in found.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_store(code: str, hub: str, output: str, more: str = "") -> str:
    """The example with its model, its data and its output in an object store: `hub` has what the names in it mean.

    `more`: further keywords of the call.
    """
    code = re.sub(r'"(Qwen/[^"]+)"', rf'"{hub}/\1"', with_files(code, f"{hub}/"))
    code = code.replace("    prompts,\n", f'    "{hub}/prompts.jsonl",\n')
    code = re.sub(r'\n *output_dir="[^"]*",', "", code).replace("outputs/helpsteer2-grpo/", "")
    (call,) = (
        n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "nemo_rl.train"
    )
    lines = code.splitlines(keepends=True)
    end = sum(len(line) for line in lines[: (call.end_lineno or 0) - 1]) + (call.end_col_offset or 0) - 1
    before = code[:end].rstrip().rstrip(",")
    return f'{before}, output_dir="{output}"{more}{code[end:]}'


def write_models(folder: Path) -> None:
    """The models that the examples name, below `folder`."""
    write_language_model(folder / "Qwen" / "Qwen2.5-0.5B-Instruct", chat=True)
    write_language_model(folder / "Qwen" / "Qwen2.5-0.5B", chat=False)
