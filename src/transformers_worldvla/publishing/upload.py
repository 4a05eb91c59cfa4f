"""A folder as one commit of a Hub repository, which is made where there is none."""

import glob
from collections.abc import Sequence
from pathlib import Path


def upload_folder(
    folder: Path,
    repository: str,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    files: Sequence[str] | None = None,
    delete: Sequence[str] = (),
    space_sdk: str | None = None,
) -> str:
    """Upload files of a folder; returns the address of the commit.

    Args:
        revision: branch to commit to, made from the default one where there is none.
        files: names relative to the folder; all by default.
        delete: patterns of files that go from the repository unless they are uploaded again.
        space_sdk: what runs a Space that is made here.

    Raises ValueError in one line when the Hub refuses; the folder is as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    patterns = None if files is None else [glob.escape(name) for name in files]  # the Hub's patterns are fnmatch's
    try:
        api = HfApi()
        repo = api.create_repo(
            repository, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=space_sdk
        ).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type=repo_type, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            allow_patterns=patterns,
            delete_patterns=list(delete) or None,
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} is complete, but {repository} refused it: {reason}") from error
    return str(commit.commit_url)
