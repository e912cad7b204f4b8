"""How fast and how small a data set of conversations becomes tokens, beside `datasets.map` with the same tokenizer.

    python benchmarks/data.py [--rows 50000] [--words 250] [--alone]

Each way runs in a process of its own, as a trainer would: from a JSONL file to what is trained on. Printed for each: rows a
second, bytes a token of memory at the peak and at rest beyond what the process had before, and bytes a token on disk.
`datasets.map` renders and tokenises alike, with as many processes, and makes no loss mask.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_inputs(folder: Path, rows: int, words: int) -> None:
    """A BPE tokenizer trained on the words, and conversations of about `words` words each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(4000)]

    def text(count: int) -> str:
        return " ".join(draw.choices(vocabulary, k=count))

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([text(2000) for _ in range(20)], trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            question, answer = text(draw.randint(10, words // 2)), text(draw.randint(10, 3 * words // 2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def memory(kind: str = "RssAnon") -> int:
    """Bytes that this process has in memory: for itself (RssAnon, without mapped files, which the system may drop), in all
    (VmRSS), or in all at most until now (VmHWM).
    """
    gc.collect()
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields[kind].split()[0]) * 1024


def run_ours(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from nemo_rl.data.prepare import prepare
    from nemo_rl.job.spec import SFTSpec, TrainingSpec

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    few = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    prepare("sft", few, tokenizer, TrainingSpec(), SFTSpec())  # what is loaded on first use
    before, started = (memory(), memory("VmRSS")), time.perf_counter()
    prepared = prepare("sft", str(folder / "rows.jsonl"), tokenizer, TrainingSpec(), SFTSpec())
    seconds = time.perf_counter() - started
    arrays = prepared.examples.arrays
    found = measured(len(prepared.examples), len(arrays.ids), seconds, before)
    started = time.perf_counter()
    prepare("sft", str(folder / "rows.jsonl"), tokenizer, TrainingSpec(), SFTSpec())
    return {**found, "again": time.perf_counter() - started, "stored": arrays.nbytes / len(arrays.ids)}


def run_datasets(folder: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    datasets.disable_progress_bars()
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    datasets.Dataset.from_list([{"a": 1}]).map(lambda row: row)  # what is loaded on first use
    before, started = (memory(), memory("VmRSS")), time.perf_counter()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    def load() -> Any:
        rows = datasets.load_dataset(
            "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=folder / "hf"
        )
        processes = len(os.sched_getaffinity(0))
        return rows.map(encode, batched=True, num_proc=processes, remove_columns=["messages"])

    made = load()
    seconds = time.perf_counter() - started
    tokens = sum(len(ids) for batch in made.iter(1000) for ids in batch["input_ids"])
    stored = sum(Path(file["filename"]).stat().st_size for file in made.cache_files) / tokens
    found = measured(len(made), tokens, seconds, before)
    started = time.perf_counter()
    load()
    return {**found, "again": time.perf_counter() - started, "stored": stored}


def measured(rows: int, tokens: int, seconds: float, before: tuple[int, int]) -> dict[str, Any]:
    return {
        "rows": rows,
        "tokens": tokens,
        "rows_per_second": rows / seconds,
        "at_peak": (memory("VmHWM") - before[1]) / tokens,
        "at_rest": max(memory() - before[0], 0) / tokens,
    }


def apart(way: str, folder: Path) -> dict[str, Any]:
    """One way in a fresh process with an empty cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=250)
    parser.add_argument("--alone", action="store_true", help="nemo-rl without datasets.map beside it")
    parser.add_argument("--way", choices=["ours", "datasets"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps((run_ours if asked.way == "ours" else run_datasets)(asked.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, asked.rows, asked.words)
        ours = apart("ours", folder)
        theirs = {} if asked.alone else apart("datasets", folder)
    print("| | nemo-rl | datasets.map | ratio |\n| --- | --- | --- | --- |")
    for key, title in (
        ("rows", "rows"),
        ("tokens", "tokens"),
        ("rows_per_second", "rows a second, from JSONL"),
        ("again", "seconds of the next start"),
        ("at_peak", "bytes a token, peak of the process"),
        ("at_rest", "bytes a token, at rest in memory"),
        ("stored", "bytes a token, in mapped files"),
    ):
        other = f"{theirs[key]:,.2f}" if theirs else ""
        ratio = f"{ours[key] / theirs[key]:.2f}" if theirs and theirs[key] else ""
        print(f"| {title} | {ours[key]:,.2f} | {other} | {ratio} |")


if __name__ == "__main__":
    main()
