"""The date that chat templates write: that of the run's beginning, so that a run which goes on tomorrow trains the same tokens."""

from __future__ import annotations

import datetime
import re
from typing import Any

_ATTRIBUTE = "_nemo_rl_started"
_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


def set_clock(tokenizer: Any, moment: datetime.datetime) -> None:
    """Lets the tokenizer's chat template write `moment` where it asks for the time. Copies and pickles keep it."""
    setattr(tokenizer, _ATTRIBUTE, moment)


def writes_the_time(tokenizer: Any) -> bool:
    """Whether the chat template asks for the time, as those of Llama 3.1 and gpt-oss do."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None) or "")


def clock_arguments(tokenizer: Any) -> dict[str, Any]:
    """What `apply_chat_template` needs to write the time that `set_clock` said; nothing where it asks for none.

    transformers passes no functions to templates, so the template's calls are replaced by what they give.
    """
    moment: datetime.datetime | None = getattr(tokenizer, _ATTRIBUTE, None)
    template = getattr(tokenizer, "chat_template", None)
    if moment is None or not isinstance(template, str) or "strftime_now" not in template:
        return {}

    def written(call: re.Match[str]) -> str:
        return repr(moment.strftime(call["format"]))

    return {"chat_template": _CALL.sub(written, template)}
