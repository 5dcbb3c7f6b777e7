"""The model hub: a folder pushed to it. Loading from it is ``load``'s."""

from __future__ import annotations

import os
import re
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from preftune.core.errors import InputError, UsageError
from preftune.modeling.quiet import quiet

REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_target(repo: str, token_variable: str) -> str:
    """The token of a push; UsageError where the repository has no name of its kind or the variable holds no token."""
    if not REPO.fullmatch(repo):
        raise UsageError(f"--push-to-hub {repo}: write OWNER/NAME")
    token = os.environ.get(token_variable)
    if not token:
        raise UsageError(f"--push-to-hub needs a token with write access in the environment variable {token_variable}")
    return token


def push_folder(folder: Path, repo: str, *, is_private: bool, token_variable: str) -> str:
    """Create the repository where it is not there, and put the folder's files into one commit; its address.

    Parameters
        repo: ``OWNER/NAME``. token_variable: the environment variable that holds the token, which is never an argument.

    Raises
        UsageError: no repository name, or no token in the variable.
        InputError: the hub refuses, or cannot be reached.
    """
    api = HfApi(token=check_target(repo, token_variable))
    try:
        with quiet():
            url = api.create_repo(repo, private=is_private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload a model exported by preftune")
    except OfflineModeIsEnabled:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set; unset it to push, the export is in {folder}") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in {401, 403}:
            raise InputError(
                f"{repo}: the hub refuses the token in {token_variable} ({status}); use one with write access to the repository"
            ) from None
        raise InputError(f"{repo}: the hub refuses the upload ({status}): {str(error).splitlines()[0]}") from None
    except (HTTPError, OSError) as error:
        raise InputError(f"{repo}: the hub cannot be reached ({str(error).splitlines()[0]}); the export is in {folder}") from None
    return str(url)
