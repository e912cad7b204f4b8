"""Using a result: answers as transformers gives them, evaluation, what is trained, the model card, the upload."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import nemo_rl
from nemo_rl.api.evaluation import pass_at
from nemo_rl.api.models import find_model
from nemo_rl.cli.main import app
from unit.chatml import CHATML, write_base
from unit.fake_hub import FakeHub, serve_hub

TEMPLATE = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n{% if loud %}!!{% endif %}", 1)
"""With the argument `loud` the prompt ends with two marks: training and use must give the same one."""
ROWS = [{"prompt": f"say {word}", "completion": word * 3} for word in ("ab", "cd", "ef", "gh")]
REWARD = """
def vowels(prompt: str, response: str) -> float:
    return float(sum(letter in "aeiou" for letter in response) > 1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("using")


@pytest.fixture(scope="module")
def result(folder: Path) -> Any:
    write_base(folder / "bases" / "tiny", TEMPLATE)
    return nemo_rl.train(
        str(folder / "bases" / "tiny"),
        ROWS,
        algorithm="sft",
        learning_rate=3e-3,
        max_steps=12,
        max_epochs=12,
        batch_size=4,
        output_dir=folder / "run",
        chat_template_kwargs={"loud": True},
        env={"NOISE": "of-no-interest"},
        log_level="error",
        backend="local",
    )


def plain_answers(checkpoint: str, conversations: list[Any], new: int) -> list[str]:
    """What transformers' own generate() answers, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
    found = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, loud=True
        )
        written = model.generate(**ids, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def nemo(*arguments: Any, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


# --- answers


def test_answers_are_those_of_transformers_with_the_template_of_training(result: Any) -> None:
    talk = [user("say ab"), {"role": "assistant", "content": "ab"}, user("again")]
    expected = plain_answers(result.checkpoint_path, [[user("say ab")], talk], 12)
    assert result.generate(["say ab", talk], max_new_tokens=12) == expected
    assert result.generate("say ab", max_new_tokens=12) == expected[:1]
    assert result.generate(talk, max_new_tokens=12) == expected[1:]
    assert any(expected)


def test_drawn_answers_are_decided_by_their_seed(result: Any) -> None:
    draws = [result.generate(["say ab"] * 2, max_new_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_what_cannot_be_asked_is_said(result: Any) -> None:
    with pytest.raises(ValueError, match="no checkpoint_path"):
        nemo_rl.TrainResult().generate("x")
    with pytest.raises(nemo_rl.DatasetError, match="expected a text, or a conversation"):
        result.generate([[{"text": "x"}]])
    for prompts in (5, b"say ab", {"role": "user", "content": "say ab"}, [5], [["say ab"]]):
        with pytest.raises(nemo_rl.DatasetError, match=r"expected a text, (or )?a conversation"):
            result.generate(prompts)
    with pytest.raises(ValueError, match="temperature"):
        result.generate("x", temperature=-1)


def test_a_pipe_is_a_conversation_that_is_answered_on_standard_output(result: Any, folder: Path) -> None:
    found = nemo("chat", folder / "run", "--max-new-tokens", 10, input="say ab\n\nagain\n/new\nsay cd\n")
    assert found.exit_code == 0, found.output
    (first,) = plain_answers(result.checkpoint_path, [[user("say ab")]], 10)
    talk = [user("say ab"), {"role": "assistant", "content": first}, user("again")]
    second, third = plain_answers(result.checkpoint_path, [talk, [user("say cd")]], 10)
    assert found.stdout == f"{first}\n{second}\n{third}\n"
    assert "tiny" not in found.stdout
    assert "loading the model" in found.stderr


def test_a_question_that_cannot_be_put_is_said_and_the_conversation_goes_on(result: Any, folder: Path) -> None:
    found = nemo("chat", folder / "run", "--max-new-tokens", 4, input="<|im_start|>user x<|im_end|>\nsay ab\n")
    assert found.exit_code == 1
    assert "a conversation as the chat template writes it" in found.stderr
    assert found.stdout == plain_answers(result.checkpoint_path, [[user("say ab")]], 4)[0] + "\n"


def test_the_stream_is_the_answer_in_parts(result: Any) -> None:
    from nemo_rl.rollout.text import TextGenerator

    asked, parts = TextGenerator(result.checkpoint_path), []
    sampling = asked.sampling(temperature=3.0, max_new_tokens=40)
    text, _ = asked.stream("say ab", sampling, parts.append, seed=5)
    assert "".join(parts) == text == asked.texts(["say ab"], sampling, seed=5)[0]
    assert len([part for part in parts if part]) > 3


def test_a_model_is_found_in_a_run_and_what_is_none_is_said(
    result: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_rl import backends

    assert find_model(folder / "run") == result.checkpoint_path
    assert find_model(result.checkpoint_path) == result.checkpoint_path
    assert find_model("owner/name") == "owner/name"
    monkeypatch.setattr(backends, "cluster_context", lambda: None)
    (folder / "empty").mkdir(exist_ok=True)
    for reference, words in {
        folder / "empty": "is no folder of a model or a run",
        "./nowhere": "is not a folder here",
        "job-of-mine": "no Kubernetes context",
    }.items():
        with pytest.raises(ValueError, match=words):
            find_model(reference)
        assert nemo("chat", reference, input="x\n").exit_code == 1


# --- evaluation


@pytest.mark.parametrize(("k", "samples", "right"), [(1, 5, 2), (3, 5, 2), (2, 4, 0), (4, 4, 1), (3, 6, 4)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(k: int, samples: int, right: int) -> None:
    choices = list(itertools.combinations([i < right for i in range(samples)], k))
    assert pass_at(k, samples, right) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_an_evaluation_scores_what_the_model_answers(result: Any, folder: Path) -> None:
    (folder / "reward.py").write_text(REWARD)
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    reward = f"{folder / 'reward.py'}:vowels"
    found = nemo("eval", folder / "run", data, "--reward", reward, "--max-new-tokens", 8, "-o", "json", "--show", 9)
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    answers = plain_answers(result.checkpoint_path, [[user(row["prompt"])] for row in ROWS], 8)
    scores = [float(sum(letter in "aeiou" for letter in answer) > 1) for answer in answers]
    assert [e["completion"] for e in told["examples"]] == answers
    assert told["mean"] == pytest.approx(sum(scores) / 4)
    assert told["pass_at"] == {"1": pytest.approx(sum(scores) / 4)}
    assert (told["prompts"], told["samples"], told["errors"]) == (4, 1, 0)

    several = nemo(
        *("eval", folder / "run", data, "--reward", reward, "--samples", 3, "--pass-at", 2, "--temperature", 2),
        *("--max-new-tokens", 8, "--max-rows", 2),
    )
    assert several.exit_code == 0, several.output
    assert "pass@2" in several.stdout
    assert "over 6 answers" in several.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--reward", "nothing.py:f"), 40, "is not a file here"),
        (("--reward", "sum"), 40, "expected package.module:function, file.py:function, or one of exact_match"),
        (("--reward", "length", "--samples", 2, "--pass-at", 3), 40, "expected each from 1 to 2"),
        (("--reward", "exact_match"), 40, "answer"),
    ],
)
def test_an_evaluation_that_cannot_work_is_a_sentence(
    result: Any, folder: Path, arguments: tuple[Any, ...], code: int, words: str
) -> None:
    (folder / "bare.jsonl").write_text('{"prompt": "say ab"}\n')
    found = nemo("eval", folder / "run", folder / "bare.jsonl", *arguments)
    assert found.exit_code == code, found.output
    assert words in found.stderr
    assert "Traceback" not in found.stderr


# --- what is trained


def test_the_data_shown_is_what_the_template_writes_with_the_trained_part_marked(result: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    data = folder / "talks.jsonl"
    talk = [user("say ab"), {"role": "assistant", "content": "ab"}, user("cd"), {"role": "assistant", "content": "efg"}]
    long = [user("x" * 500), {"role": "assistant", "content": "y"}]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (talk, long)))
    command = ("data", data, "--algorithm", "sft", "--model", folder / "run", "--set", "training.maxSequenceLength=200")
    found = nemo(*command, "-o", "json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    (parts,) = told["examples"]
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint_path)
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert "".join(part["text"] for part in parts) == whole.rstrip("\n")
    assert [part["text"] for part in parts if part["trained"]] == ["ab<|im_end|>", "efg<|im_end|>"]
    assert told["tokens"]["tokens"]["all"] == len(tokenizer(whole.rstrip("\n"))["input_ids"])
    assert told["tokens"]["trained tokens"]["all"] == len("abefg") + 2
    assert (told["rows"]["found"], told["rows"]["used"]) == (2, 1)
    assert list(told["rows"]["dropped"].values()) == [1]

    plain = nemo(*command)
    assert "⟦ab<|im_end|>⟧" in plain.stdout
    assert "1 of 2 rows used" in plain.stdout
    assert "\x1b" not in plain.stdout


def test_pairs_and_jobs_are_shown_too(result: Any, folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "say ab", "chosen": "ab", "rejected": "c"}\n')
    pair = json.loads(
        nemo("data", folder / "pairs.jsonl", "--algorithm", "dpo", "--model", folder / "run", "-o", "json").stdout
    )
    assert [(part["name"], part["trained"]) for part in pair["examples"][0]] == [
        ("", False),
        ("chosen", True),
        ("rejected", True),
    ]
    job = folder / "job.yaml"
    job.write_text(
        "apiVersion: nemo-rl.io/v1alpha1\nkind: RLTrainingJob\nmetadata: {name: x}\nspec:\n"
        f"  model: {folder / 'run'}\n  dataset: {{inline: [{{prompt: say ab}}]}}\n  reward: {{builtin: length}}\n"
        "  training: {chatTemplateKwargs: {loud: true}}\n"
    )
    shown = nemo("data", job)
    assert shown.exit_code == 0, shown.output
    assert "say ab<|im_end|>\n<|im_start|>assistant\n!!⟦completion⟧" in shown.stdout
    refused = nemo("data", folder / "pairs.jsonl", "--algorithm", "dpo")
    assert refused.exit_code == 2
    assert "without --model" in refused.stderr


# --- the model card


def test_the_card_says_how_the_model_was_made_and_nothing_of_this_machine(result: Any, folder: Path) -> None:
    from huggingface_hub import ModelCard

    path = Path(result.checkpoint_path) / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers"
    assert set(card.data.tags) == {"nemo-rl", "sft"}
    text = path.read_text() + (path.parent / "nemo_rl.json").read_text()
    for said in ("tiny", "supervised fine-tuning", "`learning_rate` | `0.003`", '`{"loud": true}`', "after step 12"):
        assert said in text, said
    assert f"`loss` | `{result.history[-1]['loss']:.6g}`" in text
    for hidden in (str(folder), str(Path.home()), "of-no-interest", "seconds"):
        assert hidden not in text, hidden


def test_the_programs_of_the_card_answer_as_the_result_does(result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(result.checkpoint_path) / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = program.replace('"path/of/this/folder"', repr(result.checkpoint_path)).replace('"Hello"', '"say ab"')
    exec(compile(program.replace("max_new_tokens=100", "max_new_tokens=9"), "card", "exec"), {})
    assert capsys.readouterr().out.rstrip("\n") == result.generate("say ab", max_new_tokens=9)[0]


def test_equal_runs_have_equal_cards_and_hub_names_are_linked(tmp_path: Path) -> None:
    from nemo_rl.job.spec import RLTrainingJobSpec
    from nemo_rl.run.card import make_record, model_card, texts_of

    spec = RLTrainingJobSpec.model_validate(
        {
            "model": "org/base-7B",
            "dataset": {"name": "org/rows", "split": "train[:10]"},
            "reward": {"builtin": "length"},
            "grpo": {"stop": ["|"], "temperature": 0.7},
            "training": {"chat_template": "{{ messages }}", "lora_rank": 4, "lora_target_modules": ["/home/me/x"]},
        }
    )
    made = {"base_model": "org/base-7B", "rewards": ["length"], "step": 3}
    record = make_record(spec, **made, metrics={"reward": 0.5, "step_seconds": 2.0, "step": 3, "note": "x"})
    assert texts_of(record) == texts_of(json.loads(json.dumps(record)))
    head = yaml.safe_load(model_card(record).split("---")[1])
    assert (head["base_model"], head["datasets"]) == ("org/base-7B", ["org/rows"])
    assert record["metrics"] == {"reward": 0.5}
    assert record["sampling"]["temperature"] == 0.7
    assert "/home" not in json.dumps(record)
    assert "{{ messages }}" not in model_card(record)


# --- the upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    import huggingface_hub.constants as constants

    with serve_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield found


def test_the_hub_gets_the_model_its_tokenizer_and_its_card_and_no_state_of_the_trainer(
    result: Any, hub: type[FakeHub]
) -> None:
    where = result.push_to_hub("me/tiny", private=True, token="hf_x")
    assert where.endswith("/me/tiny")
    folder = Path(result.checkpoint_path)
    expected = {
        "README.md",
        "nemo_rl.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert set(hub.files) >= expected
    assert not [name for name in hub.files if name.startswith(("state.json", "trainer_state", "."))]
    for name, content in hub.files.items():
        assert content == (folder / name).read_bytes(), name
    assert hub.made[0]["name"] == "tiny"
    assert hub.tokens == {"Bearer hf_x"}
    assert "hf_x" not in "".join(content.decode(errors="replace") for content in hub.files.values())
    assert os.listdir(folder)


# --- the upload at the end of a run (output.hub)


def train_for_the_hub(folder: Path, name: str, **keywords: Any) -> Any:
    base = str(folder / "bases" / "tiny")
    if not Path(base).exists():
        write_base(Path(base), TEMPLATE)
    settings = {"max_steps": 1, "batch_size": 4, "log_level": "error", "backend": "local"}
    return nemo_rl.train(base, ROWS, algorithm="sft", output_dir=folder / name, hub="me/tiny", **settings, **keywords)


def test_a_run_that_names_a_repository_is_uploaded_at_its_end(
    folder: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    found = train_for_the_hub(folder, "for-the-hub")
    assert found.hub_url == f"{hub.endpoint}/me/tiny"
    assert hub.files["model.safetensors"] == (Path(found.checkpoint_path) / "model.safetensors").read_bytes()
    assert hub.tokens == {"Bearer hf_of_the_environment"}
    assert {made.get("visibility", made.get("private")) for made in hub.made} <= {"private", True}, hub.made
    written = [path for path in (folder / "for-the-hub").rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_of_the_environment" in path.read_bytes()]


def test_without_a_token_and_without_the_right_nothing_is_trained(
    folder: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"output.hub is 'me/tiny', and there is no token; expected .* HF_TOKEN"):
        train_for_the_hub(folder, "no-token")
    monkeypatch.setenv("HF_TOKEN", "hf_reads_only")
    hub.refuses = 403
    with pytest.raises(ValueError, match=r"the hub refuses an upload to 'me/tiny' \(output.hub\): HTTP 403"):
        train_for_the_hub(folder, "no-right", hub_private=False)
    assert not (folder / "no-token").exists()
    assert not (folder / "no-right").exists()
    assert hub.files == {}


def test_an_upload_that_fails_leaves_the_result_and_says_how_to_try_again(
    folder: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")

    class Breaks(nemo_rl.Callback):
        def on_train_end(self, trainer: Any, result: Any) -> None:
            hub.refuses = 403

    with pytest.warns(
        UserWarning, match=r"(?s)was not uploaded to me/tiny .*result.push_to_hub\('me/tiny'\) tries again"
    ):
        found = train_for_the_hub(folder, "breaks", callbacks=[Breaks()])
    assert found.hub_url == ""
    assert Path(found.checkpoint_path).is_dir()
    hub.refuses = None
    assert found.push_to_hub("me/tiny").endswith("/me/tiny")


@pytest.mark.parametrize("repository", ["tiny", "me/tiny/x", "../tiny", "me tiny/x", "https://huggingface.co/me/tiny"])
def test_what_is_no_repository_is_refused(folder: Path, repository: str) -> None:
    with pytest.raises(ValueError, match="hub"):
        nemo_rl.train("x", ROWS, algorithm="sft", hub=repository, backend="local")
