"""``read_tensors``: the plain data and tensors of a ``torch.save`` file, without torch and without running anything.

Owns a reader of the part of the pickle format that such files use. The opcodes are interpreted here, and the only
callables they may name are the two that rebuild a tensor and an ordered dict; any other name is refused, so that a
dump from elsewhere can do no harm. Used by experts.py.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8", "IntStorage": "<i4",
    "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
MARK = object()


class _Name(str):
    """A global the file names; never looked up."""


def read_tensors(path: Path) -> Any:
    """Contents of a zip-format ``torch.save`` file; tensors are numpy arrays.

    Raises:
        ValueError: not such a file, or it holds objects beyond plain data and dense tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl"]
            if not names:
                raise ValueError(f"file={path} has no data.pkl: it is not written by torch.save")
            root = names[0][: -len("data.pkl")]
            return _Machine(archive, root, path).run(archive.read(names[0]))
    except zipfile.BadZipFile as error:
        raise ValueError(f"file={path} is not a file of torch.save (since torch 1.6): {error}") from error


class _Machine:
    """The stack machine of a pickle, with nothing but data on its stack."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        self._archive, self._root, self._path = archive, root, path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack[-1]
            self._step(opcode.name, argument)
        raise ValueError(f"file={self._path} is cut off")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
        if name in constants:
            stack.append(constants[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"):
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(f"{module} {attribute}"))
        elif name not in ("PROTO", "FRAME"):
            self._build(name)

    def _build(self, name: str) -> None:
        stack = self._stack
        if name in ("TUPLE", "SETITEMS", "APPENDS"):
            at = max(index for index, item in enumerate(stack) if item is MARK)
            items = stack[at + 1 :]
            del stack[at:]
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                stack[-1].extend(items)
            else:
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = stack[-count:]
            del stack[-count:]
            stack.append(tuple(items))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._call(called, arguments))
        else:
            raise ValueError(f"file={self._path} holds more than plain data and tensors (pickle opcode {name})")

    def _call(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        if called == "collections OrderedDict" and isinstance(called, _Name):
            return dict(*arguments)
        if called == "torch._utils _rebuild_tensor_v2" and isinstance(called, _Name):
            storage, offset, shape, stride = arguments[:4]
            if any(step < 0 for step in stride) or offset < 0:
                raise ValueError(f"file={self._path} holds a tensor outside its storage")
            last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            if math.prod(shape) and last >= len(storage):
                raise ValueError(f"file={self._path} holds a tensor outside its storage")
            strides = [step * storage.itemsize for step in stride]
            return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False).copy()
        raise ValueError(f"file={self._path} names {called}: refused, only plain data and dense tensors are read")

    def _storage(self, persistent: tuple[Any, ...]) -> Any:
        kind, key = str(persistent[1]).rsplit(" ", 1)[-1], persistent[2]
        if kind not in DTYPES:
            raise ValueError(f"file={self._path} holds a {kind}: use one of {', '.join(DTYPES)}")
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), DTYPES[kind])
