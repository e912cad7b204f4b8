"""Mistakes that people make in a call of `train()`, and the words without which an answer to one does not help."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_rl

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
PAIRS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
CHOICES = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]

Mistake = tuple[str, dict[str, Any], tuple[str, ...]]


def score(prompt: str, response: str) -> float:
    return float(len(response))


def returning(value: Any) -> Callable[[str, str], Any]:
    """A reward that returns this."""

    def reward(prompt: str, response: str) -> Any:
        return value

    return reward


def raising(error: Exception) -> Callable[[str, str], float]:
    def reward(prompt: str, response: str) -> float:
        raise error

    return reward


def sft(rows: Any) -> dict[str, Any]:
    return {"dataset": rows, "algorithm": "sft", "reward_fn": None}


def dpo(rows: Any) -> dict[str, Any]:
    return {"dataset": rows, "algorithm": "dpo", "reward_fn": None}


class Adds(nemo_rl.Callback):
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        metrics["x"] = object()


class Theirs:
    """As transformers calls it."""

    def on_train_begin(self, args: Any, state: Any, control: Any) -> None: ...


class Keeps(nemo_rl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": object()}

    def load_state_dict(self, state: Any) -> None: ...


ARGUMENTS: list[Mistake] = [
    ("no model", {"model": None}, ("model is required",)),
    ("an empty model", {"model": ""}, ("model is required",)),
    ("a model of another kind", {"model": 5}, ("model", "int", "hub name")),
    ("a list of models", {"model": ["a", "b"]}, ("model", "list", "hub name")),
    ("no data", {"dataset": None}, ("dataset is required",)),
    ("no rows", {"dataset": []}, ("at least one row",)),
    ("no reward", {"reward_fn": None}, ("reward_fn is required", "sft")),
    ("an unknown algorithm", {"algorithm": "ppo"}, ("'ppo'", "grpo, sft, dpo", "nearest is 'grpo'")),
    ("a misspelt algorithm", {"algorithm": "gpro"}, ("did you mean 'grpo'",)),
    ("an algorithm that is none", {"algorithm": 3}, ("algorithm", "grpo")),
    ("a misspelt keyword", {"learnin_rate": 1e-3}, ("did you mean 'learning_rate'",)),
    ("TRL's completions", {"num_generations": 4}, ("num_generations_per_prompt",)),
    ("TRL's length", {"max_completion_length": 4}, ("max_new_tokens",)),
    ("TRL's batch", {"per_device_train_batch_size": 4}, ("batch_size", "tokens_per_microbatch")),
    ("TRL's accumulation", {"gradient_accumulation_steps": 4}, ("not needed", "batch_size")),
    ("TRL's epochs", {"num_train_epochs": 4}, ("max_epochs",)),
    ("a short name", {"lr": 1e-3}, ("learning_rate",)),
    ("a keyword that is none", {"frobnicate": 1}, ("max_steps", "temperature")),
    ("adapters without a rank", {"lora_alpha": 8}, ("lora_alpha", "lora_rank", "all weights")),
    ("modules without a rank", {"lora_target_modules": ["q_proj"]}, ("lora_target_modules", "lora_rank")),
    ("a keyword of another algorithm", {**sft(PAIRS), "temperature": 0.5}, ("temperature", "grpo", "sft")),
    ("an unknown backend", {"backend": "ray"}, ("backend", "auto, local, kubernetes")),
    ("a name that is none", {"name": "My Job"}, ("name", "lower-case")),
    ("a namespace that is none", {"namespace": "A_b"}, ("namespace", "lower-case")),
    ("wait as a text", {"wait": "yes"}, ("wait", "True or False")),
    ("a tokenizer that is none", {"tokenizer": 7}, ("tokenizer", "from_pretrained")),
    ("a tokenizer that is nowhere", {"tokenizer": "./nothing"}, ("tokenizer", "./nothing")),
    ("options of the hub for rows here", {"split": "test"}, ("split", "data set")),
]

NUMBERS: list[Mistake] = [
    ("a negative learning rate", {"learning_rate": -1}, ("learning_rate", "greater than 0")),
    ("a learning rate of words", {"learning_rate": "fast"}, ("learning_rate", "number")),
    ("a learning rate that is no number", {"learning_rate": math.nan}, ("learning_rate", "finite")),
    ("an endless learning rate", {"learning_rate": math.inf}, ("learning_rate", "finite")),
    ("no rows in a batch", {"batch_size": 0}, ("batch_size", "greater than or equal to 1")),
    ("half a row", {"batch_size": 2.5}, ("batch_size", "integer")),
    ("a batch of words", {"batch_size": "many"}, ("batch_size", "integer")),
    ("a batch of True", {"batch_size": True}, ("batch_size=True", "a number, not true or false")),
    ("a learning rate of True", {"learning_rate": True}, ("learning_rate=True", "a number, not true or false")),
    ("a rank of True", {"lora_rank": True}, ("lora_rank=True", "a number, not true or false")),
    ("negative steps", {"max_steps": -1}, ("max_steps", "greater than")),
    ("no number of steps", {"max_steps": None}, ("max_steps", "integer", "leave it out for its default")),
    ("half an epoch", {"max_epochs": 0.5}, ("max_epochs", "integer")),
    ("one completion a prompt", {"num_generations_per_prompt": 1}, ("num_generations_per_prompt", "2")),
    ("a temperature of 0", {"temperature": 0}, ("temperature", "greater than 0")),
    ("a negative temperature", {"temperature": -1.0}, ("temperature", "greater than 0")),
    ("top_p above 1", {"top_p": 1.5}, ("top_p", "less than or equal to 1")),
    ("top_p of 0", {"top_p": 0}, ("top_p", "greater than 0")),
    ("a negative top_k", {"top_k": -5}, ("top_k", "greater than")),
    ("a negative beta", {"beta": -0.1}, ("beta", "greater than or equal to 0")),
    ("no room for a prompt", {"max_new_tokens": 4096}, ("max_new_tokens", "max_sequence_length", "prompt")),
    ("no new tokens", {"max_new_tokens": 0}, ("max_new_tokens", "greater than")),
    ("no sequence", {"max_sequence_length": 0}, ("max_sequence_length", "greater than")),
    ("a negative rank", {"lora_rank": -8}, ("lora_rank", "greater than")),
    ("a precision that is none", {"precision": "fp16"}, ("precision", "bf16", "fp32")),
    ("a schedule that is none", {"lr_schedule": "wavy"}, ("lr_schedule", "cosine")),
    ("a log level that is none", {"log_level": "loud"}, ("log_level", "info")),
    ("a negative seed", {"seed": -1}, ("seed",)),
    ("saving every 0 steps", {"save_every": 0}, ("save_every", "greater than")),
    ("keeping no checkpoint", {"keep_checkpoints": -1}, ("keep_checkpoints",)),
    ("a negative warm-up", {"warmup_steps": -3}, ("warmup_steps", "greater than or equal to 0")),
    ("a negative weight decay", {"weight_decay": -0.1}, ("weight_decay", "greater than or equal to 0")),
    ("a gradient norm of nothing", {"max_grad_norm": -1}, ("max_grad_norm", "greater than")),
]

ROWS_OF_DATA: list[Mistake] = [
    ("a dict of columns", {"dataset": {"prompt": ["a", "b"]}}, ("'prompt'", "list of rows", "from_dict")),
    ("a single conversation", sft({"messages": CHAT}), ("'messages'", "wrap a single row")),
    ("a list of texts", {"dataset": ["one", "two"]}, ("str", "row 0", "mapping")),
    ("a list of texts for sft", sft(["one", "two"]), ("str", "row 0", "mapping")),
    ("a list of files", {"dataset": ["a.jsonl", "b.jsonl"]}, ("'a.jsonl'", "not of files", "one file")),
    ("rows and rows", {"dataset": (ROWS, ROWS)}, ("validation_dataset", "second list")),
    ("a list of lists", {"dataset": [["a", "b"]]}, ("list", "row 0", "mapping")),
    ("one row that is none", {"dataset": [*ROWS, None]}, ("NoneType", "row 2", "mapping")),
    ("a number", {"dataset": 5}, ("int", "list of rows")),
    ("a prompt of another name", {"dataset": [{"prmpt": "a"}]}, ("'prmpt'", "prompt")),
    ("no prompt anywhere", {"dataset": [{"prompt": None, "answer": "4"}]}, ("prompt", "no value")),
    ("blank prompts", {"dataset": [{"prompt": " "}]}, ("without a prompt",)),
    ("a prompt that is a number", {"dataset": [{"prompt": 12}]}, ("int", "'prompt'", "str(")),
    ("a prompt that is missing (NaN)", {"dataset": [{"prompt": math.nan}]}, ("'prompt'", "no value")),
    ("a prompt of bytes", {"dataset": [{"prompt": b"a"}]}, ("bytes", "'prompt'", "decode")),
    ("a chat without roles", sft([{"messages": [{"content": "a"}]}]), ("no role", '"role"')),
    ("a chat of texts", sft([{"messages": ["a", "b"]}]), ("str", "message 0", '"role"')),
    ("a chat of an unknown speaker", sft([{"conversations": [{"from": "narrator", "value": "x"}]}]), ("narrator", "human")),
    ("a chat with content of numbers", sft([{"messages": [{"role": "user", "content": 5}]}]), ("int", "content", "text")),
    ("a chat with an image", sft([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]), ("image", "text only")),
    ("a chat without an answer", sft([{"messages": CHAT[:1]}]), ("without an assistant turn",)),
    ("prompts alone for sft", sft([{"prompt": "a"}]), ("completion",)),
    ("prompts alone for dpo", dpo(ROWS), ("chosen", "rejected")),
    ("ties for dpo", dpo([{"prompt": "a", "chosen": "b", "rejected": "b"}]), ("tie",)),
    ("answers of two kinds for dpo", dpo([{"prompt": "a", "chosen": "b", "rejected": [CHAT[1]]}]), ("chosen", "rejected", "convert")),
    ("columns of two kinds", sft([{"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": "b"}]), ("mixes types",)),
    ("all rows too long", {**sft(PAIRS), "max_sequence_length": 2}, ("max_sequence_length", "truncate")),
    ("half an emoji", sft([{"prompt": "a", "completion": "b\ud83d"}]), ("surrogate", "'completion'", "row 0")),
    ("half an emoji in a chat", sft([{"messages": [{"role": "user", "content": "\udc00"}, CHAT[1]]}]), ("surrogate", "row 0")),
    ("half an emoji in a prompt", {"dataset": [{"prompt": "\ud800"}]}, ("surrogate", "'prompt'", "row 0")),
    ("a misspelt split", {"dataset": "sums", "split": "trian"}, ("no split 'trian'", "['train', 'test']", "set split to one")),
    ("a misspelt subset", {"dataset": "sums", "subset": "x"}, ("no subset 'x'", "['default']", "set subset to one")),
    ("a split of a folder here", {"dataset": "./sums", "split": "test"}, ("split", "the data set is a folder")),
    ("validation rows of another shape", {"validation_dataset": [{"foo": 1}]}, ("'foo'", "prompt")),
    ("a hub data set that is not to be had", {"dataset": "org/none"}, ("'org/none'", "hub")),
    ("a date for a prompt", {"dataset": [{"prompt": datetime.date(2026, 1, 1)}]}, ("date", "'prompt'")),
]  # fmt: skip

REWARDS: list[Mistake] = [
    ("a reward that was called", {"reward_fn": 1.0}, ("reward_fn", "float")),
    ("a reward without parameters", {"reward_fn": lambda: 1.0}, ("reward_fn", "prompt", "response")),
    ("a reward of an unknown column", {"reward_fn": lambda prompt, response, solution: 1.0}, ("solution", "answer")),
    ("a reward of no value", {"reward_fn": returning(None)}, ("None", "number")),
    ("a reward of words", {"reward_fn": returning("good")}, ("good", "number")),
    ("a reward that is no number", {"reward_fn": returning(math.nan)}, ("nan", "finite")),
    ("an endless reward", {"reward_fn": returning(math.inf)}, ("inf", "finite")),
    ("a reward of a list", {"reward_fn": returning([1.0, 2.0])}, ("list", "number")),
    ("a reward that divides by zero", {"reward_fn": raising(ZeroDivisionError("division by zero"))}, ("ZeroDivisionError",)),
    ("a reward without its key", {"reward_fn": raising(KeyError("answer"))}, ("KeyError",)),
    ("a misspelt built-in", {"reward_fn": "exact_mach"}, ("exact_mach", "exact_match")),
    ("a module that is not there", {"reward_fn": "no_such_module:reward"}, ("no_such_module",)),
    ("a function that is not there", {"reward_fn": "json:no_such_function"}, ("no_such_function",)),
    ("no reward in a list", {"reward_fn": []}, ("reward_fn",)),
    ("a list with what is no reward", {"reward_fn": [score, 3]}, ("reward_fn", "int")),
    ("weights for too many", {"reward_fn": [score, score], "reward_weights": [1.0]}, ("reward_weights", "2")),
    ("weights of an unknown reward", {"reward_fn": {"a": score}, "reward_weights": {"b": 1.0}}, ("reward_weights", "'b'")),
    ("weights by name without names", {"reward_fn": [score], "reward_weights": {"a": 1.0}}, ("reward_weights", "dict")),
    ("weights that are no numbers", {"reward_fn": [score], "reward_weights": ["a"]}, ("reward_weights", "number")),
    ("a negative time limit", {"reward_timeout": -1}, ("reward_timeout", "greater than 0")),
    ("an unknown rule for errors", {"on_reward_error": "ignore"}, ("on_reward_error", "raise")),
    ("a class in place of a reward", {"reward_fn": dict}, ("reward_fn",)),
]  # fmt: skip

PLACES: list[Mistake] = [
    ("a folder that is not there", {"model": "./nomodel"}, ("./nomodel", "folder")),
    ("a model that the hub has not", {"model": "org/no-such-model"}, ("org/no-such-model", "hub")),
    ("a folder without a model", {"model": "./empty"}, ("no model in this folder", "config.json", "it holds nothing")),
    (
        "a folder of other things",
        {"model": "./sums"},
        ("no model in this folder", "it holds test.jsonl, train.jsonl, old/"),
    ),
    (
        "the folder of a run",
        {"model": "./run"},
        ("no model in this folder", "run/checkpoints/step-00000002: give that folder"),
    ),
    ("a file for a model", {"model": "./notes.txt"}, ("notes.txt",)),
    ("a file for the output", {"output_dir": "notes.txt"}, ("output_dir", "notes.txt", "file")),
    ("an output below a file", {"output_dir": "notes.txt/run"}, ("output_dir", "notes.txt", "file")),
    ("an output that is nearly an address", {"output_dir": "s3:/bucket/x"}, ("output_dir", "two slashes")),
    ("an output of too long a name", {"output_dir": "x" * 300}, ("output_dir", "no name that a folder can have")),
    ("an output with a NUL", {"output_dir": "a\0b"}, ("output_dir", "no name that a folder can have")),
    ("an output where nobody can write", {"output_dir": "/proc/x"}, ("output_dir", "/proc/x", "cannot be made")),
    ("a callback that adds what is no metric", {"callbacks": [Adds()]}, ("metric 'x'", "object", "callback")),
    ("a callback whose state is no JSON", {"callbacks": [Keeps()]}, ("state_dict() of Keeps", "JSON", "convert")),
    ("an output that is no text", {"output_dir": 5}, ("output_dir", "int")),
    ("an output without a name", {"output_dir": ""}, ("output_dir",)),
    ("resuming what is not there", {"resume": True, "output_dir": "nowhere"}, ("resume", "nowhere")),
    ("resuming from a path", {"resume": "outputs/x"}, ("resume",)),
    ("a class as a callback", {"callbacks": [dict]}, ("callback", "dict")),
    ("a function as a callback", {"callbacks": [score]}, ("callback", "function")),
    (
        "a callback of another trainer",
        {"callbacks": [Theirs()]},
        ("on_train_begin(trainer)", "derive from nemo_rl.Callback"),
    ),
    ("one callback alone", {"callbacks": object()}, ("callback", "list")),
    ("a secret in the environment", {"env": {"HF_TOKEN": "hf_abcdefghijkl"}}, ("HF_TOKEN", "secrets=")),
    ("secrets as a text", {"secrets": "HF_TOKEN"}, ("secrets", "list")),
    ("resources of words", {"memory": "lots"}, ("memory", "such as 500m, 64Gi")),
    ("an environment of texts", {"env": ["A=1"]}, ("env", "str", 'env={"NAME": "text"}')),
    ("one stop alone", {"stop": "end"}, ("stop", "must be a list")),
    ("an empty stop", {"stop": [""]}, ("stop[0]", "must not be empty")),
    ("a file as the template", {"chat_template": "./chat.jinja"}, ("chat_template", "read_text()")),
    ("a clip of others", {"clip_epsilon": 0.2}, ("clip_epsilon", "clip_low and clip_high")),
    ("negative GPUs", {"gpus": -1}, ("gpus", "greater than or equal to 0")),
    ("no node", {"nodes": 0}, ("nodes", "greater than or equal to 1")),
]


def _files() -> list[tuple[str, str, bytes, tuple[str, ...]]]:
    """Name, file, content, words: files that are no data, or not as they are."""
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return [
        ("a file that is not there", "missing.jsonl", b"", ("missing.jsonl", "not a file here")),
        ("an empty file", "a.jsonl", b"", ("no rows", "a.jsonl")),
        ("an empty csv", "a.csv", b"", ("no rows", "a.csv")),
        ("a csv of its first line", "b.csv", b"prompt,answer\n", ("no rows", "b.csv")),
        ("a broken line", "b.jsonl", b'{"prompt": "a"}\n{"prompt": oops}\n', ("line 2", "JSON")),
        ("python's quotes", "c.jsonl", b"{'prompt': 'a'}\n", ("line 1", "json.dumps")),
        ("a file cut short", "d.jsonl", b'{"prompt": "a"}\n{"prom', ("line 2", "middle of a row")),
        ("a text", "a.txt", b"hello", (".txt", ".jsonl")),
        ("a sheet of Excel", "a.xlsx", b"PK", (".xlsx", "read_excel")),
        ("a pickle", "a.pkl", b"\x80", (".pkl", "pickles are not read")),
        ("no parquet", "a.parquet", b"hello", ("Parquet",)),
        ("a pointer of git-lfs", "lfs.parquet", lfs, ("git lfs pull",)),
        ("a web page", "a.json", b"<!DOCTYPE html><html></html>", ("web page",)),
        ("other columns", "d.csv", b"foo,bar\n1,2\n", ("'foo', 'bar'", "prompt")),
        ("semicolons and other columns", "e.csv", b"foo;bar\n1;2\n", ("'foo', 'bar'", "prompt")),
        ("an open quote", "f.csv", b'prompt,answer\na,"b\nc,d\n', ("line 2", "never closed")),
        ("a cell too many", "g.csv", b"prompt,answer\na,b,c\n", ("more cells", "line 2")),
        ("a cell too few", "h.csv", b"prompt,answer\na\n", ("fewer cells", "line 2")),
        ("a column twice", "i.csv", b"prompt,prompt\na,b\n", ("'prompt' twice",)),
        ("a file of Windows", "j.csv", "prompt\né\n".encode("cp1252"), ("UTF-8", "iconv")),
        ("columns of pandas", "b.json", b'{"prompt": {"0": "a", "1": "b"}}', ("records",)),
        ("rows under a key", "c.json", b'{"data": [{"prompt": "a"}]}', ("'data'",)),
        ("a number", "d.json", b"5", ("int", "list of rows")),
        ("a list of numbers", "e.json", b"[1, 2]", ("int", "row 0")),
        ("a key twice", "f.json", b'[{"prompt": "a", "prompt": "b"}]', ("'prompt' twice",)),
        ("lines of numbers", "g.jsonl", b"1\n2\n", ("int", "row 0")),
        ("compressed without saying so", "h.jsonl", b"\x1f\x8b\x08\x00", ("gzip", ".gz")),
        ("a folder of files", "folder", b"", ("folder",)),
    ]


FILES = [(name, file, content, words) for name, file, content, words in _files()]


def make_surroundings(folder: Path) -> None:
    """Files and folders that the mistakes name."""
    (folder / "notes.txt").write_text("x")
    (folder / "empty").mkdir()
    (folder / "folder").mkdir()
    (folder / "sums" / "old").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "sums" / f"{split}.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    for step in (1, 2):
        (folder / "run" / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
        (folder / "run" / "checkpoints" / f"step-0000000{step}" / "config.json").write_text("{}")


ALL: list[Mistake] = [*ARGUMENTS, *NUMBERS, *ROWS_OF_DATA, *REWARDS, *PLACES]
