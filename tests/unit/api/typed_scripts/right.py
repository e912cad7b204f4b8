"""What a user may write; a type checker complains of nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nemo_rl
from nemo_rl import GRPOTrainer, SFTTrainer, TrainResult
from nemo_rl.api import create_trainer, get_algorithm, list_algorithms

ROWS = [{"prompt": "What is 2 + 2?", "answer": "4"}]


def correct(prompt: str, response: str, answer: str) -> float:
    return float(response.strip() == answer)


def parts(prompt: str, response: str) -> dict[str, float]:
    return {"words": min(len(response.split()) / 100, 1.0)}


async def asked(prompt: str, response: str) -> float:
    return 1.0


@nemo_rl.batched_reward
def together(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.5 for _ in responses]


class Judge(nemo_rl.Environment):
    def setup(self) -> None:
        self.count = 0

    def score(self, prompt: str, response: str, answer: str) -> float:
        return float(answer in response)

    def get_metrics(self) -> dict[str, float]:
        return {"count": 1.0}


class Asking(nemo_rl.Environment):
    async def score_async(self, prompt: str, response: str) -> dict[str, float]:
        return {"polite": 1.0}


class Watch(nemo_rl.Callback):
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        if metrics["reward"] > 0.95:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, result: TrainResult) -> None:
        print(result.total_steps)


class Rows(nemo_rl.DataModule):
    def train_rows(self) -> Iterable[Mapping[str, Any]]:
        yield {"prompt": "a"}


result = nemo_rl.train("Qwen/Qwen2.5-0.5B-Instruct", "nvidia/HelpSteer2", correct, max_steps=100)
print(result.checkpoint_path, result.metrics["reward"] + 1, result.history[-1]["reward"], result.output_dir)
result.plot("curve.png", metrics=["reward"])
print(result.trainer.current_step)
nemo_rl.train(
    "m", ROWS, parts, "GRPO", 10, 1, 1e-6, 4, 8, Path("out"), [Watch(), nemo_rl.EarlyStoppingCallback("reward")]
)
nemo_rl.train("m", ROWS, asked, temperature=0.7, top_p=0.9, top_k=None, loss_type="dr_grpo", on_reward_error="zero")
nemo_rl.train("m", ROWS, together, reward_timeout=3, reward_workers=2, log_level="DEBUG", resume=True)
nemo_rl.train("m", ROWS, Judge(), save_every=None, eval_every=10, validation_dataset=ROWS, precision="bf16")
nemo_rl.train("m", ROWS, {"judge": Judge(), "polite": Asking(), "exact": "exact_match"}, reward_weights={"judge": 2.0})
nemo_rl.train("m", ROWS, [correct, lambda prompt, response: -len(response) / 100], reward_weights=[1.0, 0.5])
nemo_rl.train("m", ROWS, lambda prompt, response: float(response.endswith(".")))
nemo_rl.train(
    "m", ROWS, "math_answer", stop=["\n"], stop_token_ids=[1], chat_template_kwargs={"enable_thinking": False}
)
nemo_rl.train(
    Path("models/tiny"), Rows(), algorithm="sft", train_on_prompt=True, lora_rank=8, lora_target_modules=["q_proj"]
)
nemo_rl.train("m", "rows.jsonl", algorithm="dpo", beta=0.2, preference_loss="ipo", resume="auto", log_level="error")
nemo_rl.train("m", "org/data", algorithm="sft", split="train[:100]", max_rows=50, streaming=True)
job = nemo_rl.train(
    "m", ROWS, correct, backend="kubernetes", wait=False, gpus=4, nodes=2, secrets=["HF_TOKEN"], name="sums",
    env={"A": "1"}, tolerations=[{"key": "gpu", "operator": "Exists"}], node_selector={"a": "b"}, memory="8Gi",
)  # fmt: skip
print(job.name, job.status().phase, job.to_yaml())
for line in nemo_rl.attach("sums", namespace="team").logs(follow=True):
    print(line.upper())
for one in nemo_rl.jobs(namespace="team"):
    status = one.status()
    if status.progress is not None:
        print(status.progress.text, status.message, status.phase, status.attempt)
    one.cancel()
fetched: TrainResult = job.result()
trainer = GRPOTrainer.from_pretrained("m", max_steps=50, max_new_tokens=64, num_generations_per_prompt=4)
trained = trainer.fit(ROWS, reward_fn=correct, callbacks=[Watch()])
trainer.save_checkpoint("outputs/hello")
SFTTrainer.from_pretrained("m", learning_rate=1e-5).fit([{"prompt": "a", "completion": "b"}])
print(
    list_algorithms(), get_algorithm("grpo"), create_trainer("sft", model="m", seed=1).output_dir, trained.total_steps
)
try:
    nemo_rl.train("m", ROWS, correct)
except nemo_rl.RewardError as error:
    print(error.traceback)
except nemo_rl.TrainingInterrupted as interrupted:
    print(interrupted.checkpoint_path, interrupted.step)
