"""Uploading a checkpoint to the Hugging Face hub: when it is asked for, or at the end of a run that names a repository."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from nemo_rl.extras import explained
from nemo_rl.job.spec import OutputSpec
from nemo_rl.run.checkpoint import STATE_FILE, TRAINER_STATE

_STAYS = (STATE_FILE, f"{TRAINER_STATE}/*", f"{TRAINER_STATE}/**", ".*")
"""What only a run that goes on needs."""


def push_folder(folder: Path, repo: str, *, private: bool | None, token: str | None) -> str:
    """Uploads a checkpoint's folder in one commit, and returns the address of the repository."""
    hub = _hub("push_to_hub()", token)
    if not folder.is_dir():
        raise ValueError(f"the checkpoint {str(folder)!r} is not a folder here; was it moved?")
    made = hub.create_repo(repo, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        ignore_patterns=list(_STAYS),
        commit_message=f"Upload of {folder.name}, trained with nemo-rl",
    )
    return str(made)


def make_ready(output: OutputSpec) -> None:
    """Makes the repository that the run will be uploaded to, before the run costs anything.

    ValueError without a token, and where the hub refuses it; what huggingface_hub raises where the hub was not reached.
    """
    assert output.hub is not None
    hub = _hub("output.hub", None)
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise ValueError(
            f"output.hub is {output.hub!r}, and there is no token; expected one with the right to write in the environment "
            "variable HF_TOKEN (on a cluster from a Secret: env with secretKeyRef, or secrets=['HF_TOKEN'] in Python)"
        )
    try:
        hub.create_repo(output.hub, private=output.hub_private, exist_ok=True)
        if "write" in inspect.signature(hub.auth_check).parameters:
            hub.auth_check(output.hub, write=True)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise
        raise ValueError(
            f"the hub refuses an upload to {output.hub!r} (output.hub): HTTP {status}; expected a token in HF_TOKEN that may "
            f"write there, or another repository: {str(error).splitlines()[0]}"
        ) from error


def upload(output: OutputSpec, folder: Path) -> str:
    """Uploads the run's best checkpoint as the specification says; returns the repository's address."""
    assert output.hub is not None
    return push_folder(folder, output.hub, private=output.hub_private, token=None)


def _hub(caller: str, token: str | None) -> Any:
    with explained(caller):
        from huggingface_hub import HfApi
    return HfApi(token=token, library_name="nemo-rl")
