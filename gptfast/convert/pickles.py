"""Two kinds of pickle files, read without running what is in them.

A pickle is a program. What torch.save wrote is loaded with weights_only=True, after its program was
found to name nothing but a state dict's parts, and its archive to hold no more than the file does.
A tokenizer's pickle may use only the operations that make strings, bytes, numbers and dicts, and
one class, in whose place a record stands here.
"""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.errors import UserError

# Far beyond any real one: 65,536 tokens are 1.1 MB; a state dict's program is 100 bytes a tensor.
_LARGEST_PROGRAM = 16 << 20

_STATE_DICT_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half")),
}

# What pickle's protocols 4 and 5 write for str, bytes, int, dict and an object's state. Neither
# REDUCE, which calls, nor tuples, which nested take for ever to hash, nor places of any number.
_DATA_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MEMOIZE", "BINGET", "LONG_BINGET", "MARK"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
    *("BININT", "BININT1", "BININT2", "NONE"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "STACK_GLOBAL", "NEWOBJ", "BUILD"),
}


class _Record:
    """Stands for tiktoken's Encoding, which would ask the network for one that is only named."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Record
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tokenizer needs")


def read_encoding(path: Path) -> dict[str, Any]:
    """The state of a pickled tiktoken.Encoding: pat_str, mergeable_ranks and special_tokens of
    their types, with whatever values. UserError with the reason for anything else."""
    try:
        program = _read(path)
        opcodes = {opcode.name for opcode, _, _ in pickletools.genops(program)}
        if odd := sorted(opcodes - _DATA_OPCODES):
            raise pickle.UnpicklingError(f"it does more than hold data: {', '.join(odd)}")
        state = _EncodingUnpickler(io.BytesIO(program)).load().state
        if not _is_encoding(state):
            raise pickle.UnpicklingError("it is not an Encoding's state")
    except UserError:
        raise
    except Exception as error:
        # A damaged program fails in any way that Python knows.
        raise UserError(f"{path} is refused: {_reason(error)}") from error
    return state


def _is_encoding(state: object) -> bool:
    def is_dict_of(value: object, keys: type, values: type) -> bool:
        return isinstance(value, dict) and all(
            type(k) is keys and type(v) is values for k, v in value.items()
        )

    return (
        isinstance(state, dict)
        and isinstance(state.get("pat_str"), str)
        and is_dict_of(state.get("mergeable_ranks"), bytes, int)
        and is_dict_of(state.get("special_tokens"), str, int)
    )


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote, mapped from the file, not copied.

    UserError with the reason if the file is anything else, or its tensors claim more than it has.
    """
    size = path.stat().st_size if path.is_file() else 0
    try:
        _check_archive(path, size)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or not state:
            raise pickle.UnpicklingError(f"it holds a {type(state).__name__}, no state dict")
        for name, tensor in state.items():
            if not (isinstance(name, str) and type(tensor) is Tensor and tensor.is_contiguous()):
                raise pickle.UnpicklingError(f"{name!r} is not a whole tensor")
        if (claimed := sum(tensor.nbytes for tensor in state.values())) > size:
            raise pickle.UnpicklingError(f"its tensors claim {claimed:,} of its {size:,} bytes")
    except UserError:
        raise
    except Exception as error:
        # A damaged archive fails in any way that torch knows.
        raise UserError(f"{path} is refused: {_reason(error)}") from error
    return state


def _check_archive(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size:
            raise pickle.UnpicklingError(f"its parts claim more than its {size:,} bytes")
        programs = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(programs) != 1 or programs[0].file_size > _LARGEST_PROGRAM:
            raise pickle.UnpicklingError("it is not one state dict")
        program = archive.read(programs[0])
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name == "GLOBAL" and argument not in _STATE_DICT_NAMES:
            name = str(argument).replace(" ", ".")
            raise pickle.UnpicklingError(f"it names {name}, which no state dict needs")
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"it uses {opcode.name}, which torch.save never does")


def _read(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_PROGRAM:
        raise UserError(f"{path} is refused: {path.stat().st_size:,} bytes are no tokenizer's")
    return path.read_bytes()


def _reason(error: Exception) -> str:
    """One line: torch's messages go on with advice to load the file after all."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
