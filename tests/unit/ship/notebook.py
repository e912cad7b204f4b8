"""Plays a notebook kernel and a pod, each as a process of its own with an empty __main__ (see `command`).

The client runs the cells of each shape in its __main__, scores the inputs, captures the reward and writes its bundle as
ConfigMap parts. The pod (any Python version) joins, checks, unpacks, loads and scores. Both print one JSON line each.
"""

import asyncio
import inspect
import json
import linecache
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
PROGRAM = "import sys; sys.path += sys.argv.pop(), sys.argv.pop(); import notebook; notebook.main()"


def command(python, *arguments):
    """Command line of `client DIR`, `pod DIR NEW_DIR` or `worker FILE` for an interpreter."""
    return [str(python), "-c", PROGRAM, *map(str, arguments), str(HERE.parent), str(HERE.parents[3])]


def run_cell(text, number):
    """Runs a cell as IPython does: a made-up file name whose text only linecache knows."""
    name = f"<ipython-input-{number}-{abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec", dont_inherit=True), sys.modules["__main__"].__dict__)


def score(reward, inputs):
    if type(reward) is list:
        return [score(each, inputs) for each in reward]
    if type(reward) is dict:
        return {name: score(each, inputs) for name, each in reward.items()}
    reward = getattr(reward, "score", reward) if not callable(reward) else reward
    if list(inspect.signature(reward).parameters)[:2] == ["prompts", "responses"]:
        return reward([p for p, _ in inputs], [r for _, r in inputs])
    if inspect.iscoroutinefunction(reward):
        return [asyncio.run(reward(p, r)) for p, r in inputs]
    return [float(reward(p, r)) for p, r in inputs]


def say(**answer):
    print(json.dumps(answer), flush=True)


def client(folder):
    from nemo_rl.backends.kubernetes.ship.capture import capture
    from nemo_rl.job import names

    sys.path.insert(0, str(folder / "home"))
    os.chdir(folder / "home")
    number = 0
    for shape in shapes().SHAPES.values():
        try:
            for cell in shape.cells:
                number += 1
                run_cell(cell, number)
            reward = eval(shape.entry, sys.modules["__main__"].__dict__)
            found = capture(reward)
            for i, part in enumerate(found.archive.parts):
                place = folder / "parts" / slug(shape.name)
                place.mkdir(parents=True)
                (place / names.bundle_part(i)).write_bytes(part)
            say(
                name=shape.name,
                how=found.how,
                notes=list(found.notes),
                sha256=found.archive.sha256,
                entrypoint=found.entrypoint,
                python=found.python,
                scores=score(reward, shapes().INPUTS),
            )
        except Exception as error:
            say(name=shape.name, error=f"{type(error).__name__}: {error}")


def pod(folder, target):
    from nemo_rl.worker.bundles import load_entry, open_bundle

    for line in (folder / "client.jsonl").read_text().splitlines():
        told = json.loads(line)
        if "error" in told:
            continue
        name = slug(told["name"])
        try:
            unpacked = open_bundle(name, told["sha256"], target, root=folder / "parts", python=told["python"])
            reward = load_entry(unpacked, told["entrypoint"])
            say(name=told["name"], scores=score(reward, shapes().INPUTS), pickle=pickled(reward))
        except Exception as error:
            say(name=told["name"], error=f"{type(error).__name__}: {error}")


def worker(pickles):
    """A process that the pod hands its rewards to."""
    import pickle

    for name, data in json.loads(pickles.read_text()).items():
        try:
            say(name=name, scores=score(pickle.loads(bytes.fromhex(data)), shapes().INPUTS))
        except Exception as error:
            say(name=name, error=f"{type(error).__name__}: {error}")


def pickled(reward):
    try:
        import cloudpickle

        return cloudpickle.dumps(reward).hex()
    except Exception:
        return None


def slug(name):
    return name.replace(" ", "-")


def shapes():
    import importlib.util

    if "nemo_rl_shapes" not in sys.modules:
        spec = importlib.util.spec_from_file_location("nemo_rl_shapes", HERE.with_name("shapes.py"))
        sys.modules["nemo_rl_shapes"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["nemo_rl_shapes"]


def main():
    role, *folders = sys.argv[1:]
    {"client": client, "pod": pod, "worker": worker}[role](*map(Path, folders))
