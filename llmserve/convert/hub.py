"""A source as the user names it -> a directory: one that is here, or a download from the Hub.

Revisions, tokens (HF_TOKEN), the cache and resumed downloads are huggingface_hub's; its errors are
turned into one sentence that says what to do.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from llmserve.checkpoint.companions import COMPANION_DIRECTORIES, COMPANION_FILES
from llmserve.checkpoint.config_file import INDEX_FILE
from llmserve.errors import CheckpointError, CheckpointNotFoundError

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# No pickles: the weights are safetensors or the checkpoint is refused.
_ALLOW_PATTERNS = [
    *("config.json", "model*.safetensors", INDEX_FILE, *COMPANION_FILES),
    *(f"{name}/*" for name in COMPANION_DIRECTORIES),
]


def locate(source: str) -> Path:
    """The directory of a source: itself, or where its download is.

    Args:
        source: A directory, or a Hub id: 'owner/name' or 'owner/name@revision'.

    Raises:
        CheckpointNotFoundError: Neither a directory nor a model on the Hub.
        CheckpointError: The Hub refuses or cannot be reached.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    match = _HUB_ID.fullmatch(source)
    if path.is_file():
        raise CheckpointError(f"{source} is a file; give the directory it is in")
    if match is None:
        raise CheckpointNotFoundError(
            f"there is no directory {source or repr(source)}, and it is no Hub id (owner/name or "
            "owner/name@revision)"
        )
    return _download(source, match["repo"], match["revision"])


def _download(source: str, repo: str, revision: str | None) -> Path:
    # Imported here: only a Hub id needs it, and it takes a while.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=_ALLOW_PATTERNS, tqdm_class=_progress_class()
        )
    # The order matters: the first three are kinds of the fourth.
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then set "
            "HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repo} has no revision {revision!r} on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no directory {source} here and no model {repo} on the Hub; for a private "
            "one set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no directory {source} here, and the Hub cannot be reached to look for a "
            "model of that name; check the network and HF_HUB_OFFLINE"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise CheckpointError(f"the Hub refused {source}: {_first_line(error)}") from error
    # Each of its transports (httpx, requests, xet) has errors of its own for a broken connection.
    except Exception as error:
        raise CheckpointError(f"downloading {source} failed: {_first_line(error)}") from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _progress_class() -> type[Any] | None:
    """None for huggingface_hub's own bars; where nobody watches, bars that draw nothing."""
    if sys.stderr.isatty():
        return None
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return Silent
