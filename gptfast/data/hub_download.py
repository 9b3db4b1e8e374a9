"""Fetch one file of a dataset on the Hub: `python hub_download.py REPO FILE FOLDER`.

A program of its own, which fineweb.py runs: a download that hangs ends only with its process, and
it imports nothing of ours. Prints one line of JSON: {"size", "sha256"} that the Hub states, or
{"status", "url"} if the Hub refuses (exit code 1).
"""

import json
import sys

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError


def main(repo: str, name: str, folder: str) -> int:
    url = hf_hub_url(repo, name, repo_type="dataset")
    try:
        remote = get_hf_file_metadata(url)
        hf_hub_download(
            repo,
            name,
            repo_type="dataset",
            # What is fetched is what was described, even if the dataset changes now.
            revision=remote.commit_hash,
            local_dir=folder,
        )
    except HfHubHTTPError as error:
        print(json.dumps({"status": error.response.status_code, "url": url}))
        return 1
    # The tag of a file in large-file storage is the sha256 of its content.
    print(json.dumps({"size": remote.size, "sha256": remote.etag}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
