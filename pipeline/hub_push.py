"""An export on a hub of models: a repository for each network, a branch for each step.

    OUTPUT/discriminator               REPO_ID, branch main
    OUTPUT/generator                   REPO_ID-generator (REPO_ID where there is no discriminator)
    OUTPUT/step-00010000/...           the same repositories, branch step-00010000

New repositories are private until their owner says otherwise: the licence of the text decides who
may have the weights. The hub, the token and proxies are huggingface_hub's settings (HF_ENDPOINT,
HF_TOKEN or `hf auth login`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError
from pipeline.export_repositories import ARCHITECTURES, PRETRAINING_CONFIG

MAIN = "main"
_STALE = ["*.safetensors", "*.safetensors.index.json", "onnx/*", "modeling_*.py"]
"""Files of an earlier push that go where they are not pushed again; all others stay."""
_REFUSED = (401, 403)


class Upload(NamedTuple):
    """A folder and where it goes."""

    folder: Path
    repo_id: str
    branch: str
    step: int


def find_uploads(export: Path, repo_id: str) -> list[Upload]:
    """List what an export holds.

    Args:
        export: Folder written by `deberta export`.
        repo_id: NAMESPACE/NAME.

    Returns:
        The newest weights first, then the steps in order.

    Raises:
        UserError: It is no export.
    """
    branches = [(export, MAIN)]
    branches += [(folder, folder.name) for folder in sorted(export.glob("step-*"))]
    uploads = []
    for root, branch in branches:
        present = [n for n in ARCHITECTURES if (root / n / PRETRAINING_CONFIG).is_file()]
        for number, name in enumerate(present):
            document = json.loads((root / name / PRETRAINING_CONFIG).read_text(encoding="utf-8"))
            suffix = f"-{name}" if number else ""
            step = document["export"]["step"]
            uploads.append(Upload(root / name, repo_id + suffix, branch, step))
    if not uploads or uploads[0].branch != MAIN:
        raise UserError(f"{export}: no export; name a folder written by `deberta export`")
    return uploads


def push_export(
    export: Path, repo_id: str, *, public: bool = False, say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Upload an export; repeated, it uploads what is new.

    Args:
        export: Folder written by `deberta export`.
        repo_id: NAMESPACE/NAME.
        public: Whether repositories that are made can be read by everybody; those that exist keep
            what they are.
        say: Gets a line for each upload.

    Returns:
        URLs of the repositories.

    Raises:
        UserError: It is no export, the hub refuses, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    uploads = find_uploads(export, repo_id)
    api, urls = HfApi(), {}
    with _explained(export, repo_id):
        for upload in uploads:
            name = upload.repo_id
            if name not in urls:
                urls[name] = str(api.create_repo(name, private=not public, exist_ok=True))
            if upload.branch != MAIN:
                api.create_branch(name, branch=upload.branch, exist_ok=True)
            api.upload_folder(
                repo_id=name,
                folder_path=upload.folder,
                revision=upload.branch,
                commit_message=f"Weights after {upload.step:,} steps",
                delete_patterns=_STALE,
            )
            say(f"{urls[name]} ({upload.branch}): {upload.folder}")
    return list(urls.values())


@contextmanager
def _explained(export: Path, repo_id: str) -> Iterator[None]:
    """Turn what the hub or the network answers into one message with a cure."""
    from huggingface_hub import errors

    again = f"{export} is whole: repeat with `deberta push {export} {repo_id}`"
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"--push {repo_id}: no name of a repository ({error})") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"HF_HUB_OFFLINE forbids to reach the hub: unset it; {again}") from error
    except errors.HfHubHTTPError as error:
        reason = str(error.server_message or error).partition("\n")[0]
        if error.response.status_code in _REFUSED:
            raise UserError(
                f"the hub refuses {repo_id} ({error.response.status_code}, {reason}): `hf auth "
                f"login` with a token that may write there, or set HF_TOKEN; {again}"
            ) from error
        raise UserError(f"the hub failed at {repo_id} ({reason}); {again}") from error
    except (_transport_error(), OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"the hub cannot be reached for {repo_id} ({cause}); {again}") from error


def _transport_error() -> type[Exception]:
    """Find the class of what goes wrong below HTTP; its package changes with huggingface_hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
