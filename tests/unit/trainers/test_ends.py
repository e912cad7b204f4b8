"""What ends a completion: the end of the template's turn, texts and tokens that a user names; and what rewards see of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from unit.chatml import CHATML, THINKS, write_base


def run(model: Any, rows: Any, out: Path, reward: Any = None, **settings: Any) -> Any:
    quick = {"max_steps": 1, "batch_size": 4, "save_every": None, "log_level": "error", "backend": "local"}
    if settings.get("algorithm", "grpo") == "grpo":
        quick |= {"max_new_tokens": 6, "num_generations_per_prompt": 2}
    return nemo_rl.train(str(model), rows, reward, output_dir=out, **{**quick, **settings})


def saved_ends(checkpoint: str) -> list[int]:
    value = json.loads((Path(checkpoint) / "generation_config.json").read_text())["eos_token_id"]
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("im_end_special", [True, False])
def test_end_of_the_templates_turn_is_saved_and_ends_completions(tmp_path: Path, im_end_special: bool) -> None:
    from transformers import AutoTokenizer

    base = write_base(tmp_path / "base", im_end_special=im_end_special)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    taught = run(base, [{"prompt": p, "completion": "ok"} for p in "abcd"], tmp_path / "sft", algorithm="sft")
    assert saved_ends(taught.checkpoint_path) == ends
    result = run(
        taught.checkpoint_path, [{"prompt": p} for p in "abcd"], tmp_path / "grpo", lambda prompt, response: 1.0
    )
    assert result.trainer.end_ids == ends
    assert saved_ends(result.checkpoint_path) == ends


def test_own_template_and_stop_tokens_count_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", special=("<stop>",))
    template = CHATML.replace("<|im_end|>", "<|im_start|>")  # ends turns with another token
    rewards = {"reward_fn": lambda prompt, response: float(len(response))}
    settings = {"chat_template": template, "stop": ["<stop>"], "stop_token_ids": [7]}
    result = run(base, [{"prompt": "a"}] * 4, tmp_path / "out", rewards["reward_fn"], **settings)
    names = result.trainer.tokenizer.convert_ids_to_tokens(result.trainer.end_ids)
    assert set(names) >= {"<|endoftext|>", "<|im_start|>", "<stop>"}
    assert 7 in result.trainer.end_ids
    assert set(saved_ends(result.checkpoint_path)) == set(result.trainer.end_ids)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(result.checkpoint_path).chat_template == template


def test_completion_ends_where_a_stop_text_is_complete(tmp_path: Path) -> None:
    from nemo_rl.job.spec import TrainingSpec
    from nemo_rl.model.load import choose_device, load_model, load_tokenizer
    from nemo_rl.model.policy import Policy
    from nemo_rl.rollout.in_process.engine import generate
    from nemo_rl.rollout.protocol import Sampling
    from nemo_rl.rollout.stops import Stops

    base = str(write_base(tmp_path / "base"))
    tokenizer = load_tokenizer(base)
    policy = Policy(load_model(base, TrainingSpec(), choose_device(0)), "fp32")

    def sample(stops: Stops | None) -> list[Any]:
        sampling = Sampling(8, 24, stops=stops)
        groups = generate(policy, [[1, 2], [3]], sampling, end_ids=[tokenizer.eos_token_id], seed=1, step=0)
        return [completion for group in groups for completion in group]

    free = sample(None)
    pairs = [tokenizer.decode(c.ids[i : i + 2]) for c in free for i in range(3, len(c.ids) - 1)]
    text = next(pair for pair in pairs if len(pair) == 2 and pair.isascii() and pair.isprintable())  # of two tokens
    stopped = sample(Stops(tokenizer, [text, "never there"]))
    for before, after in zip(free, stopped, strict=True):
        whole = tokenizer.decode(before.ids)
        cut = next((n for n in range(1, len(before.ids) + 1) if text in tokenizer.decode(before.ids[:n])), None)
        assert after.ids == (before.ids if cut is None else before.ids[:cut])
        assert after.finished == (before.finished or cut is not None)
        assert after.logprobs == pytest.approx(before.logprobs[: len(after.ids)], abs=1e-5)
        assert (text in whole) == (cut is not None)
    assert any(after.ids != before.ids for before, after in zip(free, stopped, strict=True))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("<|im_start|>assistant\n", ""),
        ("is <think> a tag?", ""),
    ],
)
def test_opening_tag_that_the_prompt_has_written_belongs_to_the_response(
    tmp_path: Path, prompt: str, expected: str
) -> None:
    from nemo_rl.model.load import load_tokenizer
    from nemo_rl.rollout.responses import opening_tag

    tokenizer = load_tokenizer(str(write_base(tmp_path / "base", THINKS)))
    assert opening_tag(tokenizer, tokenizer(prompt)["input_ids"]) == expected


def test_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    with pytest.raises(ValueError, match=r"found no tokenizer in .* save it there"):
        run(base, [{"prompt": "a", "completion": "b"}], tmp_path / "out", algorithm="sft")


def test_end_tokens_are_said_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    run(base, [{"prompt": "a", "completion": "b"}], tmp_path / "out", algorithm="sft", log_level="info")
    assert "end tokens: <|endoftext|>, <|im_end|>" in capsys.readouterr().out
