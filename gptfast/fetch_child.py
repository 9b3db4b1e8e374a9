"""Fetch one file: `python fetch_child.py hub FOLDER REPO NAME` or `... web FOLDER URL SHA256`.

A program of its own, which fetch.py runs and can kill; it imports nothing of ours. Prints one line
of JSON: {"path", "size", "sha256"}, where the file is and what it should have, or {"status",
"url"} if the server refuses.
"""

import json
import shutil
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

# Silence on a connection that ends a download from the web.
_TIMEOUT_SECONDS = 60.0


def from_hub(folder: str, repo: str, name: str) -> dict[str, object]:
    url = hf_hub_url(repo, name, repo_type="dataset")
    try:
        remote = get_hf_file_metadata(url)
        path = hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            # What is fetched is what was described, even if the dataset changes now.
            revision=remote.commit_hash,
            local_dir=folder,
        )
    except HfHubHTTPError as error:
        return {"status": error.response.status_code, "url": url}
    # The tag of a file in large-file storage is the sha256 of its content.
    return {"path": path, "size": remote.size, "sha256": remote.etag}


def from_web(folder: str, url: str, sha256: str) -> dict[str, object]:
    path = Path(folder, "content")
    try:
        with urlopen(url, timeout=_TIMEOUT_SECONDS) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
            size = int(answer.headers.get("Content-Length", file.tell()))
    except HTTPError as error:
        return {"status": error.code, "url": url}
    return {"path": str(path), "size": size, "sha256": sha256}


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    print(json.dumps({"hub": from_hub, "web": from_web}[kind](*arguments)))
