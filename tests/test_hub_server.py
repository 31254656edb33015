"""The loopback Hub answers the real clients as the Hub does: content, revisions, ranges and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repository


def run_client(code: str, environment: dict[str, str], *arguments: object) -> Any:
    """Run `code` in a process of its own, where `result` is what it is to return as JSON."""
    program = f"import json, sys\n{code}\nprint('RESULT', json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("RESULT", 1)[1])


def test_files_branches_tags_and_ranges_come_back_as_they_were_pushed(hub: HubServer, tmp_path: Path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello\n")
    (tmp_path / "folder" / "deep" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    result = run_client(
        """
import urllib.request
from huggingface_hub import HfApi, get_token, snapshot_download
from pathlib import Path
api, repo = HfApi(), "me/things"
api.create_repo(repo, private=True)
first = api.upload_folder(repo_id=repo, folder_path=sys.argv[1], commit_message="all of it").oid
api.create_tag(repo, tag="v1")
api.create_branch(repo, branch="side")
api.upload_file(path_or_fileobj=b"changed", path_in_repo="README.md", repo_id=repo)
api.delete_file("deep/weights.safetensors", repo_id=repo)
old = Path(snapshot_download(repo, revision="v1"))
url = f"{api.endpoint}/{repo}/resolve/v1/deep/weights.safetensors"
headers = {"Authorization": f"Bearer {get_token()}", "Range": "bytes=254-257"}
refs = api.list_repo_refs(repo)
result = {
    "name": api.whoami()["name"], "first": first, "now": sorted(api.list_repo_files(repo)),
    "side": sorted(entry.path for entry in api.list_repo_tree(repo, revision="side", recursive=True)),
    "readme": (old / "README.md").read_text(), "weights": len((old / "deep" / "weights.safetensors").read_bytes()),
    "range": list(urllib.request.urlopen(urllib.request.Request(url, headers=headers)).read()),
    "license": api.model_info(repo, revision="v1").card_data.license,
    "refs": [sorted(ref.name for ref in refs.branches), sorted(ref.name for ref in refs.tags)],
    "titles": [commit.title for commit in api.list_repo_commits(repo)],
    "info": [entry.size for entry in api.get_paths_info(repo, ["deep/weights.safetensors", "deep"], revision="v1")
             if hasattr(entry, "size")],
}
""",
        hub.env,
        tmp_path / "folder",
    )
    assert result == {
        "name": "me", "first": hub.repository("model", "me/things").tags["v1"],
        "now": [".gitattributes", "README.md"],
        "side": [".gitattributes", "README.md", "deep", "deep/weights.safetensors"],
        "readme": "---\nlicense: apache-2.0\n---\nhello\n", "weights": 10240, "range": [254, 255, 0, 1],
        "license": "apache-2.0", "refs": [["main", "side"], ["v1"]], "info": [10240],
        "titles": ["Delete deep/weights.safetensors with huggingface_hub", "Upload README.md with huggingface_hub",
                   "all of it", "initial commit"],
    }  # fmt: skip


def test_a_data_set_and_a_space_are_pushed_and_pulled(hub: HubServer, tmp_path: Path):
    result = run_client(
        """
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi
api = HfApi()
Dataset.from_dict({"name": ["a", "b", "c"], "value": [1, 2, 3]}).push_to_hub("me/numbers")
api.create_tag("me/numbers", tag="v1", repo_type="dataset")
Dataset.from_dict({"name": ["d"], "value": [4]}).push_to_hub("me/numbers")
api.create_repo("me/page", repo_type="space", space_sdk="gradio")
api.upload_file(path_or_fileobj=b"print(1)", path_in_repo="app.py", repo_id="me/page", repo_type="space")
result = {
    "old": load_dataset("me/numbers", split="train", revision="v1").to_dict(),
    "new": load_dataset("me/numbers", split="train").to_dict(), "sdk": api.space_info("me/page").sdk,
}
""",
        hub.env,
    )
    assert result == {
        "old": {"name": ["a", "b", "c"], "value": [1, 2, 3]}, "new": {"name": ["d"], "value": [4]}, "sdk": "gradio",
    }  # fmt: skip
    assert hub.repository("space", "me/page").files()["app.py"].data == b"print(1)"


ERRORS = """
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api, result = HfApi(), {}
for name, call in {
    "whoami": lambda: api.whoami(), "create": lambda: api.create_repo("me/new"),
    "elsewhere": lambda: api.create_repo("others/new"),
    "repo": lambda: api.model_info("me/absent"), "revision": lambda: api.model_info("me/there", revision="v9"),
    "file": lambda: api.hf_hub_download("me/there", "absent.txt"), "private": lambda: api.model_info("me/secret"),
    "commit": lambda: api.upload_file(
        path_or_fileobj=b"x", path_in_repo="x", repo_id="me/there", parent_commit="a" * 40
    ),
}.items():
    try:
        call()
        result[name] = "done"
    except HfHubHTTPError as error:
        result[name] = [type(error).__name__, error.response.status_code]
"""


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (
            "right",
            {
                "whoami": "done", "create": "done", "elsewhere": ["HfHubHTTPError", 403], "private": "done",
                "repo": ["RepositoryNotFoundError", 404], "revision": ["RevisionNotFoundError", 404],
                "file": ["RemoteEntryNotFoundError", 404], "commit": ["HfHubHTTPError", 412],
            },
        ),
        (
            "wrong",
            {name: ["HfHubHTTPError", 401] for name in
             ("whoami", "create", "elsewhere", "private", "repo", "revision", "file", "commit")},
        ),
        (
            None,
            {
                "create": ["HfHubHTTPError", 401], "elsewhere": ["HfHubHTTPError", 401],
                "private": ["RepositoryNotFoundError", 401], "repo": ["RepositoryNotFoundError", 404],
                "revision": ["RevisionNotFoundError", 404], "file": ["RemoteEntryNotFoundError", 404],
                "commit": ["HfHubHTTPError", 401],
            },
        ),
    ],
    ids=["right token", "wrong token", "no token"],
)  # fmt: skip
def test_errors_are_those_of_the_hub(hub: HubServer, token: str | None, expected: dict[str, Any]):
    hub.repositories["model", "me/there"] = Repository("model", "me/there")
    hub.repositories["model", "me/secret"] = Repository("model", "me/secret", private=True)
    environment = hub.environment(hub.token if token == "right" else token)
    code = ERRORS if token else ERRORS.replace('"whoami": lambda: api.whoami(), ', "")
    assert run_client(code, environment) == expected


UPLOAD = """
import huggingface_hub.utils._http as http
from huggingface_hub import HfApi
http.time.sleep = lambda seconds: None  # between attempts
HfApi().create_repo("me/weights", exist_ok=True)
try:
    HfApi().upload_folder(repo_id="me/weights", folder_path=sys.argv[1])
    result = "done"
except Exception as error:
    result = type(error).__name__
"""
# The RuntimeError is the client's own, "Error while uploading '<file>' to the Hub."
LOST_CONNECTION = {"ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "RuntimeError"}


@pytest.mark.parametrize("request_", ["PUT /lfs/", "POST /api/models/me/weights/commit/"])
def test_a_server_that_dies_in_an_upload_keeps_what_was_committed_and_takes_it_again(
    hub: HubServer, tmp_path: Path, request_: str
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.bin").write_bytes(b"\0" * 3_000_000)
    hub.die_at(request_)
    assert run_client(UPLOAD, hub.env, tmp_path / "folder") in LOST_CONNECTION
    assert list(hub.repository("model", "me/weights").files()) == [".gitattributes"]
    hub.start()
    assert run_client(UPLOAD, hub.env, tmp_path / "folder") == "done"
    assert hub.repository("model", "me/weights").files()["weights.bin"].data == b"\0" * 3_000_000
