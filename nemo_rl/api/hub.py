"""Uploading a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from nemo_rl.extras import explained
from nemo_rl.run.checkpoint import STATE_FILE, TRAINER_STATE

_STAYS = (STATE_FILE, f"{TRAINER_STATE}/*", f"{TRAINER_STATE}/**", ".*")
"""What only a run that goes on needs."""


def push_folder(folder: Path, repo: str, *, private: bool | None, token: str | None) -> str:
    """Uploads a checkpoint's folder in one commit, and returns the address of the repository."""
    with explained("push_to_hub()"):
        from huggingface_hub import HfApi
    if not folder.is_dir():
        raise ValueError(f"the checkpoint {str(folder)!r} is not a folder here; was it moved?")
    hub = HfApi(token=token, library_name="nemo-rl")
    made = hub.create_repo(repo, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        ignore_patterns=list(_STAYS),
        commit_message=f"Upload of {folder.name}, trained with nemo-rl",
    )
    return str(made)
