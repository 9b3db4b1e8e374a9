"""Pickles from strangers: whatever they would do is refused with a reason, and none of it runs."""

import importlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import tiktoken
import torch

from gptfast.convert.pickles import read_encoding
from gptfast.convert.reference import read_reference, read_tokenizer
from gptfast.convert.trained import TrainedModel
from gptfast.errors import UserError
from tests.convert_cases import (
    make_encoding,
    make_reference,
    make_trained,
    write_as_the_reference,
)


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return make_trained(rope_base=10000.0, softcap=15.0)


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    return write_as_the_reference(tmp_path / "theirs", make_reference(), make_encoding(trained))


def read(path: Path) -> TrainedModel:
    return read_reference(path, path.with_name("tokenizer.pkl"))


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects(mark: Path) -> dict[str, object]:
    """Each would make the file `mark`, or worse, if it ran."""
    return {
        "os.system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(mark)!r}, 'w')"),
        "open": Calls(open, str(mark), "w"),
        "import": Calls(importlib.import_module, "antigravity"),
        "bytearray": Calls(bytearray, 10**12),
        "a named encoding": Calls(tiktoken.get_encoding, "gpt2"),
    }


def test_where_nothing_guards_they_do_their_harm(tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(hostile_objects(mark)["os.system"]))
    assert mark.exists()


NAMES = list(hostile_objects(Path()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["alone", "beside"])
def test_no_call_in_a_tokenizer_runs(trained, tmp_path, name, protocol, place):
    mark, path = tmp_path / "mark", tmp_path / "tokenizer.pkl"
    hostile = hostile_objects(mark)[name]
    content = hostile if place == "alone" else (make_encoding(trained), hostile)
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"tokenizer.pkl is refused: it does more than hold data"):
        read_encoding(path)
    assert not mark.exists()


def test_a_name_alone_is_refused_too(tmp_path):
    path = tmp_path / "tokenizer.pkl"
    for module, name in (("os", "system"), ("builtins", "eval"), ("tiktoken", "Encoding")):
        # Names, then makes an object of it as an Encoding is made: no call of a function.
        text = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
        path.write_bytes(b"\x80\x04" + b"".join(text) + b"\x93)\x81}b.")
        with pytest.raises(UserError, match=rf"it names {module}.{name}, which no tokenizer"):
            read_encoding(path)


def encoding_with(trained: TrainedModel, **state: object) -> bytes:
    """A pickled Encoding of any state."""
    whole = {**make_encoding(trained).__getstate__(), **state}
    encoding = tiktoken.Encoding.__new__(tiktoken.Encoding)

    class Stated(tiktoken.Encoding):
        def __getstate__(self):
            return whole

    encoding.__class__ = Stated
    Stated.__module__, Stated.__qualname__ = "tiktoken.core", "Encoding"
    original, tiktoken.core.Encoding = tiktoken.core.Encoding, Stated
    try:
        return pickle.dumps(encoding, 4)
    finally:
        tiktoken.core.Encoding = original


def test_a_tokenizer_whose_values_are_wrong_is_refused(trained, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    ranks, specials = trained.tokenizer.encoding._mergeable_ranks, trained.tokenizer.specials
    path.write_bytes(encoding_with(trained))
    assert read_encoding(path)["special_tokens"] == specials
    cases = {
        "not an Encoding's state": [
            {"pat_str": 5},
            {"mergeable_ranks": {"a": 1}},
            {"mergeable_ranks": {**ranks, b"zz": "7"}},
            {"special_tokens": {"<|bos|>": None}},
        ],
        "is not a merge of two earlier": [{"mergeable_ranks": {**ranks, b"qzx": 591}}],
        "holds no tokenizer: list index": [{"mergeable_ranks": {**ranks, b"": 591}}],
        "are not 0 to": [{"mergeable_ranks": {**ranks, b"zz": 7}}],
        "single bytes have no rank": [{"mergeable_ranks": {b"zz": 0}}],
        r"lack <\|bos\|>": [{"special_tokens": {"<|end|>": 591}}],
        "do not follow the 591 others": [{"special_tokens": {"<|bos|>": 2000}}],
        "holds no tokenizer": [{"pat_str": "(unclosed"}],
    }
    for reason, states in cases.items():
        for state in states:
            path.write_bytes(encoding_with(trained, **state))
            with pytest.raises(UserError, match=reason):
                read_tokenizer(path)


def test_a_tokenizers_file_that_is_damaged_or_a_bomb_is_refused(trained, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    whole = pickle.dumps(make_encoding(trained), 4)
    text = b"\x80\x04X" + struct.pack("<I", 2**31) + b"short"
    # Tuples in tuples, each twice: 2**64 of them to hash as a key.
    nested = b"\x80\x04)" + b"\x94h\x00\x86" * 64
    for content, reason in (
        (whole[:-200], "is refused"),
        (b"", "is refused"),
        (b"hello", "is refused"),
        (text, "is refused: .*expected 2147483648 bytes"),
        (nested + b".", "does more than hold data: TUPLE2"),
        (b"\x80\x04N.", "is refused"),
        (b"\x80\x04" + b"r\xff\xff\xff\x7f" + b".", "does more than hold data: LONG_BINPUT"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as refusal:
            read_encoding(path)
        assert "\n" not in str(refusal.value)
    with path.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="1,000,000,000 bytes are no tokenizer's"):
        read_encoding(path)


@pytest.mark.parametrize("name", NAMES)
def test_no_call_in_a_model_runs(checkpoint, tmp_path, name):
    mark = tmp_path / "mark"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "extra": hostile_objects(mark)[name]}, checkpoint)
    with pytest.raises(UserError, match=r"model_000650.pt is refused: it names .*which no state"):
        read(checkpoint)
    assert not mark.exists()


def rezipped(path: Path, compression: int, replacement: bytes | None = None) -> None:
    """The archive again; its pickle replaced."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            is_program = name.endswith("data.pkl") and replacement is not None
            archive.writestr(name, replacement if is_program else data)


def test_a_models_file_that_is_damaged_or_a_bomb_is_refused(checkpoint):
    whole = checkpoint.read_bytes()

    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason) as refusal:
            read(checkpoint)
        assert "\n" not in str(refusal.value)
        checkpoint.write_bytes(whole)

    checkpoint.write_bytes(whole[: len(whole) // 2])
    refused("is refused: File is not a zip file")
    checkpoint.write_bytes(b"")
    refused("is refused")
    # The old format: a bare pickle.
    checkpoint.write_bytes(pickle.dumps(torch.load(checkpoint, weights_only=True)))
    refused("is refused: File is not a zip file")
    rezipped(checkpoint, zipfile.ZIP_DEFLATED)
    refused("it is compressed, which torch.save never does")
    state = torch.load(checkpoint, weights_only=True)
    torch.save([1, 2], checkpoint)
    refused("it holds a list, no state dict")
    torch.save({**state, "step": 5}, checkpoint)
    refused("'step' is not a whole tensor")
    # One number that claims to be 10**12, and one tensor under a thousand names.
    torch.save({**state, "big": torch.zeros(1).expand(10**6, 10**6)}, checkpoint)
    refused("'big' is not a whole tensor")
    torch.save(dict.fromkeys(map(str, range(1000)), torch.zeros(10**4)), checkpoint)
    refused(r"its tensors claim 40,000,000 of its [\d,]+ bytes")
    rezipped(checkpoint, zipfile.ZIP_STORED, pickle.dumps({"a": 1}, 4)[:-3])
    refused("is refused")
    assert read(checkpoint).step == 650
