"""Hub ids, with huggingface_hub's download replaced: no test needs a network."""

import fnmatch
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from llmserve.convert.converter import convert
from llmserve.convert.hub import locate
from llmserve.errors import CheckpointError, CheckpointNotFoundError
from tests.models import make_llama


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """snapshot_download returns tmp_path/snapshot and its arguments land here."""
    made: list[dict[str, Any]] = []

    def download(repo_id: str, **kwargs: Any) -> str:
        made.append({"repo_id": repo_id, **kwargs})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return made


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
    ],
)
def test_ids_and_revisions(
    calls: list[dict[str, Any]], source: str, repo: str, revision: str | None
) -> None:
    assert locate(source).name == "snapshot"
    assert (calls[0]["repo_id"], calls[0]["revision"]) == (repo, revision)
    # No token is passed: huggingface_hub finds HF_TOKEN or the login itself.
    assert "token" not in calls[0]


def test_only_what_is_needed_is_downloaded(calls: list[dict[str, Any]]) -> None:
    locate("owner/name")

    def taken(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in calls[0]["allow_patterns"])

    wanted = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors")
    wanted += ("model.safetensors.index.json", "tokenizer.json", "chat_template.jinja")
    assert all(taken(name) for name in wanted)
    unwanted = ("pytorch_model.bin", "consolidated.00.pth", "original/model.safetensors")
    assert not any(taken(name) for name in (*unwanted, "consolidated.safetensors", "model.gguf"))


def test_a_directory_goes_before_a_hub_id(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    assert not calls


def test_convert_takes_a_hub_id(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    make_llama(tmp_path / "snapshot", tokenizer=False)
    convert("owner/name@main", tmp_path / "out")
    assert (tmp_path / "out" / "rank0.safetensors").is_file()


@pytest.mark.parametrize("source", ["./owner/name", "a/b/c", "name", "/no/where", "owner/", ""])
def test_what_can_be_no_hub_id_asks_no_hub(calls: list[dict[str, Any]], source: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        locate(source)
    assert not calls


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (
            errors.GatedRepoError("x\ny", response=_response(403)),
            CheckpointError,
            "owner/name is gated: accept its terms.*HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError("x\ny", response=_response(404)),
            CheckpointNotFoundError,
            "no directory owner/name@v9 here and no model owner/name on the Hub.*HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError("x\ny", response=_response(404)),
            CheckpointNotFoundError,
            "no revision 'v9'",
        ),
        (errors.LocalEntryNotFoundError("x\ny"), CheckpointNotFoundError, "cannot be reached"),
        (
            errors.HfHubHTTPError("500 Server Error\nrequest id", response=_response(500)),
            CheckpointError,
            "refused owner/name@v9: 500 Server Error",
        ),
        (errors.HFValidationError("bad name"), CheckpointError, "bad name"),
        (OSError(28, "No space left on device"), CheckpointError, "failed: .*No space"),
        (httpx.ReadTimeout("too slow"), CheckpointError, "failed: too slow"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], words: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(error, match=words) as caught:
        locate("owner/name@v9")
    assert "\n" not in str(caught.value)
