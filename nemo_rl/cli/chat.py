"""`nemo-rl chat`: a conversation with a trained model, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from nemo_rl.api.models import find_model
from nemo_rl.cli.jobs import INTERRUPTED, OTHER_ERROR
from nemo_rl.extras import explained, require
from nemo_rl.job.text import dotted
from nemo_rl.run.directory import nearby

HELP = "a line is a question; /new forgets the conversation, /quit or Ctrl-D ends"


def chat(
    reference: str,
    *,
    namespace: str | None,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float | None,
    seed: int,
    trust_remote_code: bool,
) -> int:
    """Answers each line of standard input; returns the exit code: 1 where a question of a pipe could not be answered."""
    require("nemo-rl chat", "torch")
    _say("loading the model")
    with explained("nemo-rl chat"):
        from nemo_rl.rollout.text import TextGenerator
    asked = TextGenerator(find_model(reference, namespace=namespace), trust_remote_code=trust_remote_code)
    sampling = asked.sampling(temperature=temperature, max_new_tokens=max_new_tokens, top_p=top_p)
    interactive = sys.stdin.isatty()
    _say(f"{nearby(asked.name)} on {asked.device.type}{f'; {HELP}' if interactive else ''}")
    if not asked.has_template:
        _say(
            "its tokenizer has no chat template, so each line is given to the model as it stands, without those before it"
        )
    opening = [{"role": "system", "content": system}] if system and asked.has_template else []
    messages = list(opening)
    code = 0
    for number, line in enumerate(_lines(interactive)):
        if line in ("/quit", "/exit", "/new"):
            if line != "/new":
                break
            messages = list(opening)
            continue
        question = {"role": "user", "content": line}
        try:
            prompt: Any = [*messages, question] if asked.has_template else line
            text, finished = asked.stream(prompt, sampling, _write, seed=seed + number)
        except ValueError as error:
            _say(str(error))
            code = OTHER_ERROR
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            _write(" …\n")  # the answer is given up, the conversation goes on before it
            continue
        _write("\n")
        if not finished:
            _say(f"cut off after max_new_tokens={sampling.max_new_tokens}")
        messages += [question, {"role": "assistant", "content": text}]
    return 0 if interactive else code


def _lines(interactive: bool) -> Iterator[str]:
    """The questions: what is typed, or the lines of a pipe; empty ones are left out."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            raise SystemExit(INTERRUPTED) from None
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _write(text: str) -> None:
    """A part of an answer. On a terminal what is not printable becomes a dot, so that a model never drives it."""
    if sys.stdout.isatty():
        text = dotted(text, keep="\n\t")
    print(text, end="", flush=True)


def _say(sentence: str) -> None:
    print(f"nemo-rl: {sentence}", file=sys.stderr, flush=True)
