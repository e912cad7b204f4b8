"""A user with nine shapes of reward: ships each, and compares what the pods scored with what they score here.

Runs in any Python that has the client; one JSON line for each shape. Arguments: model, rows (JSON), a prefix of names.
"""

import json
import sys
from pathlib import Path


def submit(reward, model, rows, name, folder):
    import nemo_rl

    return nemo_rl.train(
        model,
        json.loads(Path(rows).read_text()),
        reward,
        max_steps=1,
        batch_size=2,
        num_generations_per_prompt=4,
        max_new_tokens=8,
        logged_completions=8,
        gpus=0,
        size="1Gi",
        name=name,
        output_dir=folder,
        wait=False,
    )


def main(model, rows, prefix):
    # what `import mylib` of a cell finds, and the shapes
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path.cwd())]
    from nemo_rl.backends.kubernetes.ship.errors import ShipError
    from nemo_rl.run.metrics import read_history
    from unit.ship.notebook import run_cell
    from unit.ship.shapes import FILES, NINE

    for file, text in FILES.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text, encoding="utf-8")
    rewards, jobs = {}, {}
    for number, shape in enumerate(NINE):
        for cell in shape.cells:
            run_cell(cell, number)
        reward = rewards[shape.name] = eval(shape.entry, sys.modules["__main__"].__dict__)
        name = f"{prefix}-{shape.name.replace(' ', '-')}"
        try:
            jobs[shape.name] = submit(reward, model, rows, name, f"{prefix}/{shape.name}")
        except ShipError as error:
            print(json.dumps({"name": shape.name, "refused": str(error)}), flush=True)
    for name, job in jobs.items():
        result = job.result()
        seen = read_history(result.output_dir / "completions.jsonl")
        here = [float(rewards[name](row["prompt"], row["completion"])) for row in seen]
        print(json.dumps({"name": name, "here": here, "there": [row["reward"] for row in seen]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
