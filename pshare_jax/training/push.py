"""Pushes an exported decode module to the Hugging Face hub (`pshare-export --push`)."""

from pathlib import Path
from typing import cast

from pshare_jax.errors import PshareError


def check_name(name: str) -> None:
    """Checks that `name` is the name of a model on the hub, ORG/MODEL.

    Raises:
        PshareError: it is not.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise PshareError("--push needs a name on the Hugging Face hub, as ORG/MODEL.")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads the folder's files as the model `name`, which is created if it does not exist, and returns its address.

    Raises:
        PshareError: no token, a token without the right, a public model that should be private, or no connection.
    """
    from huggingface_hub import HfApi, errors

    # OSError, and the general error of the HTTP library, which is another in each major version of huggingface_hub.
    unreachable = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise PshareError(
                f"{name} exists on the hub and is public, so nothing was uploaded; make it private there, or omit --private."
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a decode module")
    except errors.LocalTokenNotFoundError:
        reason = "there is no token; log in with `hf auth login`, or set HF_TOKEN"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub returned an error ({str(error).splitlines()[0]})"
        if status == 401:
            reason = "the hub does not know the token; log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = f"the token may not write to {name}; use a token with write access"
    except unreachable as error:
        reason = f"the hub cannot be reached ({error})"
    else:
        return str(address)
    raise PshareError(f"The decode module is in {folder}, but was not pushed: {reason}.")
