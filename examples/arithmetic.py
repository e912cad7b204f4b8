"""Grade-school word problems, from a model that knows nothing to one that answers most of them, on this machine.

    python examples/arithmetic.py [--seed 0] [--output outputs/arithmetic] [--curve curve.svg] [--short]

Nothing is downloaded: model, tokenizer and problems are made here. Supervised fine-tuning shows how one counts on or back, GRPO
then raises the share of right answers from a reward that looks at the last number alone. docs/tutorial.md goes through it.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nemo_rl

PEOPLE = ("Ann", "Ben", "Eva", "Tom")
THINGS = ("apples", "books", "coins", "pens")
STORIES = (
    ("{who} has {a} {what} and buys {b} more .", 1),
    ("{who} has {a} {what} and finds {b} more .", 1),
    ("{who} has {a} {what} and gives {b} away .", -1),
    ("{who} has {a} {what} and loses {b} of them .", -1),
)
QUESTION = "How many {what} has {who} now ? Answer :"
NUMBERS = 20
WORDS = sorted({w for text, _ in STORIES for w in f"{text} {QUESTION}".split() if "{" not in w} | {*PEOPLE, *THINGS})


def make_problems(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Returns rows {prompt, answer, counting} of different problems, none of them in `without`; counting leads to the answer."""
    draw = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        story, sign = draw.choice(STORIES)
        b = draw.randint(1, 6)
        a = draw.randint(0, NUMBERS - 1 - b) if sign > 0 else draw.randint(b, NUMBERS - 1)
        prompt = f"{story} {QUESTION}".format(who=draw.choice(PEOPLE), what=draw.choice(THINGS), a=a, b=b)
        if prompt not in without:
            counting = " ".join(str(a + sign * n) for n in range(1, b + 1))
            rows[prompt] = {"prompt": prompt, "answer": str(a + sign * b), "counting": counting}
    return list(rows.values())


def make_model(folder: Path, seed: int) -> str:
    """Writes a randomly initialised Llama model (0.4 M parameters) and a tokenizer whose tokens are words and numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *map(str, range(NUMBERS)), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def correct(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response is the answer."""
    return float(response.split()[-1:] == [answer])


class Enough(nemo_rl.Callback):
    """Ends a run once its loss is low: what an answer looks like is known then, and there is something left for GRPO to learn."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_step_end(self, trainer: nemo_rl.SFTTrainer, step: int, metrics: dict[str, float]) -> None:
        trainer.should_stop = metrics["loss"] < self.loss


def accuracy(result: nemo_rl.TrainResult, problems: list[dict[str, str]]) -> float:
    """Returns the share of problems that the checkpoint answers right with its likeliest tokens."""
    answers = result.generate([problem["prompt"] for problem in problems], max_new_tokens=8)
    return sum(correct("", found, row["answer"]) for found, row in zip(answers, problems, strict=True)) / len(problems)


def main(arguments: list[str] | None = None) -> nemo_rl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of model, problems and training (default 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/arithmetic"), help="folder of all that is written")
    parser.add_argument("--curve", type=Path, help="where the curves go (default: curve.svg in that folder)")
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that all of it works")
    options = parser.parse_args(arguments)
    started = time.monotonic()

    test = make_problems(16 if options.short else 200, seed=10_000)
    unseen = frozenset(row["prompt"] for row in test)
    problems = make_problems(640 if options.short else 4_000, seed=options.seed, without=unseen)
    model = make_model(options.output / "model", options.seed)

    taught = nemo_rl.train(
        model,
        [{"prompt": row["prompt"], "completion": f" {row['counting']}"} for row in problems],
        algorithm="sft",
        max_steps=4 if options.short else 200,
        max_epochs=20,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=20,
        seed=options.seed,
        log_every=20,
        callbacks=[Enough(loss=0.5)],
        output_dir=options.output / "sft",
        backend="local",
    )
    before = accuracy(taught, test)

    result = nemo_rl.train(
        taught.checkpoint_path,
        problems,
        correct,
        algorithm="grpo",
        validation_dataset=test,
        eval_every=20,
        max_steps=4 if options.short else 100,
        max_epochs=2,
        batch_size=8 if options.short else 32,
        num_generations_per_prompt=8,
        max_new_tokens=8,
        learning_rate=3e-4,
        warmup_steps=5,
        seed=options.seed,
        log_every=10,
        output_dir=options.output / "grpo",
        backend="local",
    )
    after = accuracy(result, test)

    curve = options.curve or options.output / "curve.svg"
    result.plot(curve, title="GRPO on word problems")
    print(f"\nright answers to unseen problems before GRPO: {before:.0%}")
    print(f"right answers to unseen problems after GRPO:  {after:.0%}")
    print(f"curves: {curve}")
    print(f"model:  {result.checkpoint_path}")
    print(f"seconds: {time.monotonic() - started:.0f}")
    return result


if __name__ == "__main__":
    main()
