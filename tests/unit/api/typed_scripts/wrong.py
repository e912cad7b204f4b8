"""Twenty-eight mistakes, each in a line that says so; a type checker finds nearly all."""

from __future__ import annotations

from typing import Any

import nemo_rl
from nemo_rl import GRPOTrainer

ROWS = [{"prompt": "What is 2 + 2?", "answer": "4"}]


def correct(prompt: str, response: str) -> float:
    return 1.0


def words(prompt: str, response: str) -> None: ...


nemo_rl.train("m", ROWS, correct, learnin_rate=1e-5)  # mistake: a misspelt keyword
nemo_rl.train("m", ROWS, correct, max_stpes=5)  # mistake: a misspelt argument
nemo_rl.train("m", ROWS, correct, num_generations=5)  # mistake: a keyword of another library
nemo_rl.train("m", ROWS, correct, temperature="hot")  # mistake: a text for a number
nemo_rl.train("m", ROWS, correct, max_steps="3")  # mistake: a text for a whole number
nemo_rl.train("m", ROWS, correct, batch_size=2.5)  # mistake: half a row
nemo_rl.train("m", ROWS, correct, algorithm="ppo")  # mistake: an algorithm that is not there
nemo_rl.train("m", ROWS, correct, loss_type="ppo")  # mistake: a loss that is not there
nemo_rl.train("m", ROWS, correct, lr_schedule="cosin")  # mistake: a misspelt schedule
nemo_rl.train("m", ROWS, correct, backend="ray")  # mistake: a backend that is not there
nemo_rl.train("m", ROWS, correct, secrets="HF_TOKEN")  # mistake: a text for a list
nemo_rl.train("m", ROWS, correct, lora_target_modules="q_proj")  # mistake: a text for a list of names
nemo_rl.train("m", ["a.jsonl", "b.jsonl"], correct)  # mistake: a list of files
nemo_rl.train(5, ROWS, correct)  # mistake: a number for a model
nemo_rl.train("m", ROWS, words)  # mistake: a reward without a value
nemo_rl.train("m", ROWS, 1.0)  # mistake: a number for a reward
nemo_rl.train("m", ROWS, correct, callbacks=[nemo_rl.Callback])  # mistake: a class for a callback
nemo_rl.train("m", ROWS, correct, callbacks=nemo_rl.Callback())  # mistake: one callback alone
result = nemo_rl.train("m", ROWS, correct)
print(result.checkpoint)  # mistake: a misspelt attribute
print(result.metrics["reward"].upper())  # mistake: a number used as a text
result.plot(metric="reward")  # mistake: a misspelt parameter
job = nemo_rl.attach("sums", namspace="team")  # mistake: a misspelt namespace
nemo_rl.attach("sums").stop()  # mistake: a method that is not there
for one in nemo_rl.jobs():
    print(one.status().fase)  # mistake: a misspelt phase
nemo_rl.trian("m", ROWS, correct)  # mistake: a misspelt function
GRPOTrainer.from_pretrained("m", max_stps=3)  # mistake: a misspelt keyword of a trainer


class Watch(nemo_rl.Callback):
    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None: ...  # mistake: a hook without its step


class Judge(nemo_rl.Environment):
    def score(self, prompt: str, response: str) -> str:  # mistake: a score that is a text
        return "good"
