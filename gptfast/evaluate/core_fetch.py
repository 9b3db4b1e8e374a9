"""Fetch the CORE bundle: one archive, known by its sha256, unpacked whole or not at all."""

import shutil
import uuid
import zipfile
from pathlib import Path

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

    Call it in one process a node. UserError with the cause and what to do if it cannot be had.
    """
    folder = cache.expanduser() / FOLDER
    if (folder / CONFIG_FILE).is_file():
        return folder
    scratch = folder.with_name(f".{FOLDER}-{uuid.uuid4().hex}")
    try:
        name = f"{FOLDER}.zip"
        (fetched,) = fetch_files(scratch, {name: archive}, policy=policy, progress=progress)
        with zipfile.ZipFile(fetched) as zipped:
            zipped.extractall(scratch)
        if not (scratch / FOLDER / CONFIG_FILE).is_file():
            raise UserError(f"{archive} holds no {FOLDER}/{CONFIG_FILE}")
        (scratch / FOLDER).replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
