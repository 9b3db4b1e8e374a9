"""Fetch the CORE bundle: one archive, known by its sha256, unpacked whole or not at all."""

import zipfile
from pathlib import Path

from gptfast.cache import place, sole_maker
from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import CONFIG_FILE
from gptfast.fetch import FetchPolicy, WebFile, fetch_files

ARCHIVE = WebFile(
    url="https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
    # As several independent users of the archive recorded it in 2026 (github.com, search for it).
    sha256="90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200",
)
# The folder in the archive.
FOLDER = "eval_bundle"


def fetch_bundle(
    cache: Path,
    *,
    archive: WebFile = ARCHIVE,
    policy: FetchPolicy | None = None,
    progress: bool = False,
) -> Path:
    """The bundle's folder in `cache`; fetched (162 MB) and verified if it is not there yet.

    Call it in one process a node. The archive stays beside the folder, so that a command that was
    stopped while unpacking it need not fetch it again. UserError with the cause and what to do if
    it cannot be had.
    """
    cache = cache.expanduser()
    folder = cache / FOLDER
    if (folder / CONFIG_FILE).is_file():
        return folder
    [fetched] = fetch_files(cache, {f"{FOLDER}.zip": archive}, policy=policy, progress=progress)
    with sole_maker(folder) as scratch:
        if not (folder / CONFIG_FILE).is_file():
            with zipfile.ZipFile(fetched) as zipped:
                zipped.extractall(scratch)
            if not (scratch / FOLDER / CONFIG_FILE).is_file():
                raise UserError(f"{archive} holds no {FOLDER}/{CONFIG_FILE}")
            place(scratch / FOLDER, folder)
    return folder
