"""Writes docs/models.md from the reports of all types: `python tests/architectures/table.py FOLDER`; see `make architectures`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/models.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HEAD = """# Models

nemo-rl trains every causal (decoder) model that `AutoModelForCausalLM` of transformers opens: dense models, mixtures of experts,
sliding windows, linear attention, state spaces, and hybrids of them. You choose nothing: before the first step, each model is
compared with itself.

## The proof before step 1

Ways of computing are tried from fast to slow, and the first one that is right is taken. Right means: within 1e-3 of the plain
model, that is transformers' own forward, one unpadded sequence at a time, in float32. Compared are the log-probability of every
token, the gradient, and, for GRPO, the log-probabilities of a few completions sampled from prompts of different lengths. The
sequences are longer than the model's window as far as a few seconds of computing allow. A small model takes about a second.

| Training | What it means |
| --- | --- |
| packed | transformers' modules on one row of flat tokens with our attention: no padding, a shared prompt is computed once |
| packed, prompts apart | the same, each sequence whole; layers with a state are told where sequences begin |
| hidden | transformers' modules on padded batches; logits are made in chunks |
| logits | the same, for models whose logits are more than an output layer; memory grows with the vocabulary |
| ..., one by one | each sequence by itself, for models that mishandle padding |

| Rollouts | What it means |
| --- | --- |
| packed | transformers' modules with our attention and cache: prompts run packed, nothing is padded |
| cache | transformers' forward and the model's own cache, prompts padded on the left |
| cache, one length at a time | prompts of equal lengths run together, for models whose state padding would enter |
| no cache, ... | every token runs the whole sequence again: slow, for models whose cache is wrong, missing or refused |

Where no way is right, the run stops before its first step, in a sentence. So do encoders and parts of encoder-decoder models,
which `AutoModelForCausalLM` also opens. Dropout of every kind and router noise are off in training; the configuration that is
saved keeps them.

`activation_checkpointing` and `lora_rank` are part of the proof. LoRA adapts every linear layer by default, and checkpoints hold the
merged model, which equals the adapted one; peft leaves the output projection of Mamba layers out.

## Every type

Checked with tiny random models by `make architectures`: transformers {transformers}, torch {torch}, peft {peft}, on the CPU in float32.
"Checked" is what equals the plain model: log-probabilities (at most 1e-3 nats), gradients of GRPO and SFT batches (1e-3 relative),
greedy and sampled rollouts (ragged prompts, groups), a checkpoint's way to disk and back, activation checkpointing, LoRA.
The numbers are the largest error of a log-probability and of a gradient.

| Type | Training | Rollouts | Checked | Largest errors | Notes |
| --- | --- | --- | --- | --- | --- |
"""


def page(reports: dict[str, dict[str, Any]], names: list[str]) -> str:
    text = HEAD
    for name in ("transformers", "torch", "peft"):
        text = text.replace(f"{{{name}}}", version(name).split("+")[0])
    rows = [_row(name, reports.get(name)) for name in sorted(names)]
    right = [r for r in reports.values() if not (r["refusal"] or r["not_built"] or r["failures"])]
    refused = [r for r in reports.values() if r["refusal"]]
    total = f"\nOf {len(rows)} types {len(right)} are right in all checks and {len(refused)} are refused in words.\n"
    return text + "\n".join(rows) + "\n" + total


def _row(name: str, report: dict[str, Any] | None) -> str:
    if report is None:
        return f"| `{name}` | | | not checked | | not among the reports: the proof before step 1 decides |"
    if report["not_built"]:
        return (
            f"| `{name}` | | | not checked | | transformers does not make a small one: {_cell(report['not_built'])} |"
        )
    if report["refusal"]:
        return f"| `{name}` | refused | refused | | | {_cell(report['refusal'])} |"
    checks, failures = report["checks"], report["failures"]
    notes = [f"wrong: {k}: {v}" for k, v in failures.items()]
    notes += [report[key] for key in ("recompute", "lora") if report[key] not in ("right", "")]
    own = checks.pop("transformers' own save and load", None)
    if own is not None:
        notes.append(f"transformers' own save and load is off by {own:.0e}")
    logprob = max((v for k, v in checks.items() if "rollouts" in k or k == "log-probabilities"), default=0.0)
    gradient = max(
        (v for k, v in checks.items() if "gradient" in k or k in ("LoRA", "activation checkpointing")), default=0.0
    )
    whole = not failures and report["recompute"] == report["lora"] == "right"
    checked = "all" if whole else ", ".join(k for k in checks if k not in failures)
    return (
        f"| `{name}` | {report['path']} | {report['rollouts']} | {checked} | {logprob:.0e}, {gradient:.0e} | "
        f"{_cell('; '.join(notes))} |"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


def main(folder: str) -> None:
    from architectures.tiny_models import all_types

    reports = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in Path(folder).glob("*.json")}
    PAGE.write_text(page(reports, all_types()), encoding="utf-8")
    slowest = sorted(reports.values(), key=lambda report: -report.get("seconds", 0.0))[:8]
    shown = ", ".join(f"{report['type']} {report.get('seconds', 0.0):.0f}" for report in slowest)
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(reports)} types; the slowest, in seconds of a processor: {shown}")


if __name__ == "__main__":
    main(sys.argv[1])
