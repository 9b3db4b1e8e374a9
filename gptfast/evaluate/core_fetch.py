"""Fetch the CORE bundle: one archive, known by its sha256, unpacked whole or not at all."""

import hashlib
import shutil
import urllib.request
import uuid
import zipfile
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import CONFIG_FILE

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# As several independent users of the archive recorded it in 2026 (github.com, search the digest).
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
# The folder in the archive.
FOLDER = "eval_bundle"
_BLOCK = 1 << 20
# Silence on the connection for this long ends the download.
_TIMEOUT_SECONDS = 60.0


def fetch_bundle(
    cache: Path, *, url: str = URL, sha256: str = SHA256, progress: bool = False
) -> Path:
    """The bundle's folder in `cache`; fetched (162 MB) and verified if it is not there yet.

    Call it in one process a node. UserError with the cause and what to do if it cannot be had.
    """
    folder = cache / FOLDER
    if (folder / CONFIG_FILE).is_file():
        return folder
    scratch = cache / f".{FOLDER}-{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    try:
        archive = scratch / "archive.zip"
        found = _download(url, archive, progress)
        if found != sha256:
            raise UserError(
                f"{url} has sha256 {found[:16]}..., expected {sha256[:16]}...: the download was "
                "damaged (run again) or the file has changed (unpack one you trust, and name its "
                "folder)"
            )
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(scratch)
        if not (scratch / FOLDER / CONFIG_FILE).is_file():
            raise UserError(f"{url} holds no {FOLDER}/{CONFIG_FILE}")
        (scratch / FOLDER).replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download(url: str, path: Path, progress: bool) -> str:
    """Write what the address gives; its sha256."""
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer,
            path.open("wb") as file,
            tqdm(
                total=int(answer.headers.get("Content-Length") or 0) or None,
                desc="CORE bundle",
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            while block := answer.read(_BLOCK):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    except (OSError, HTTPException) as error:
        raise UserError(
            f"the CORE bundle could not be fetched from {url}: {error}; fetch and unpack it "
            "elsewhere, and name its folder"
        ) from error
    return digest.hexdigest()
