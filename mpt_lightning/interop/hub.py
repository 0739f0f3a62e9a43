"""Uploading an export to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from mpt_lightning.errors import MPTError
from mpt_lightning.interop.card import CARD
from mpt_lightning.io import one_line


def push(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload what `export_peft` or `export_prompt_embeds` wrote to the repository "user/name", and return its address.

    A repository that does not exist is created, `private` or by default with the account's setting.

    Raises:
        MPTError: If the folder is not an export, or the repository cannot be reached or written.
    """
    path = Path(folder).expanduser()
    if not (path / CARD).is_file():
        raise MPTError(f"{folder} is not an export: it has no {CARD}. Expected a folder that `mpt export` wrote.")
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Upload with mpt_lightning")
    except Exception as error:  # network errors have no base class that huggingface_hub exports
        raise MPTError(
            f"{folder} was not pushed to {repo_id!r}: {one_line(error).rstrip('.') or type(error).__name__}. Check the "
            "repository's name, `hf auth login` and the connection; the folder itself is complete."
        ) from error
    return str(address)
