"""The model of a finished job, by the name of the job: asked by `nemo-rl chat`, scored by `nemo-rl eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from e2e.scene import Scene
from nemo_rl.cli.main import app

PROMPTS = ("321=", "54=", "9081=")
NEW = 8


def answers_of(folder: Path) -> list[str]:
    """What transformers alone answers to each prompt, taking the likeliest token each time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(tokens, max_new_tokens=NEW, do_sample=False)[0, tokens.shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
    return answers


def test_the_model_of_a_job_is_asked_and_scored_by_the_name_of_the_job(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = scene.apply(scene.manifests.sft("sort", steps=20))
    job.phase("Succeeded")
    monkeypatch.chdir(tmp_path)
    words = ["--namespace", scene.namespace, "--max-new-tokens", str(NEW)]
    asked = CliRunner().invoke(app, ["chat", "sort", *words], input="".join(f"{prompt}\n" for prompt in PROMPTS))
    assert asked.exit_code == 0, asked.output
    # the checkpoint that the job calls its best was fetched, and answers as transformers does with it
    answers = answers_of(tmp_path / "outputs" / job.status["checkpoint"]["best"])
    assert any(answers)
    assert asked.stdout.splitlines() == answers
    references = [*answers[:-1], f"{answers[-1]}0"]
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, references, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = CliRunner().invoke(app, ["eval", "sort", "rows.jsonl", "--reward", "exact_match", "-o", "json", *words])
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["mean"] == pytest.approx((len(PROMPTS) - 1) / len(PROMPTS))
