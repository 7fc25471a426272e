"""Reads pickles of arrays without unpickling them: nothing that a file names is imported or called.

The opcodes are parsed by the standard library's ``pickletools`` and carried out by a machine that knows dictionaries,
tuples, numbers, text, bytes, and the calls by which numpy and jax store an array. Those calls are recognised by name
and replaced by copying bytes into a new array, so that jax is not needed. Everything else is refused.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voltpi.potential.errors import InputError

__all__ = ["read_array_pickle"]

_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")  # protocol 5
_JAX_ARRAY = "jax._src.array._reconstruct_array"
_NDARRAY, _DTYPE = "numpy.ndarray", "numpy.dtype"
_ALLOWED = {*_RECONSTRUCT, *_FROM_BUFFER, _JAX_ARRAY, _NDARRAY, _DTYPE}
_FLOATS = ("f2", "f4", "f8")

_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Global(NamedTuple):
    """An allowed name; it stays a name."""

    name: str


class _DType:
    """A numpy dtype as it is being described."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array as it is being described."""

    def __init__(self) -> None:
        self.values: NDArray[np.floating] | None = None


class _Refused(Exception):
    """What the file asks for is not allowed; the message says what."""


def read_array_pickle(path: Path) -> dict[str, NDArray[np.floating]]:
    """The arrays (float16, 32 or 64) in a pickle of nested dictionaries, protocol 3 or later; keys joined by ``/``.

    Raises InputError for a file that cannot be read, is cut short or damaged, or holds or asks for anything else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools's, about escapes in damaged names
            content = _Machine().run(data)
        return dict(_leaves(content, ()))
    except _Refused as refused:
        raise InputError(
            f"{path}: refused, because it {refused}, and nothing of it was carried out; save the parameters as float "
            "arrays in plain dictionaries, and unpickle this file nowhere unless you trust its origin"
        ) from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "its opcodes do not fit together"
        raise InputError(f"{path}: cut short, damaged or no pickle ({reason}); copy the file again") from None


class _Machine:
    """The stack machine of the pickle protocol, without the parts that reach out."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under open marks
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _TUPLES:
            n = _TUPLES[name]
            stack[-n:] = [tuple(stack[-n:])]
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if isinstance(self.memo[argument], dict):  # no circles, and no branch that is there a million times
                raise _Refused("uses a dictionary twice")
            stack.append(self.memo[argument])
        elif name in ("TUPLE", "SETITEMS"):
            items, self.stack = stack, self.below.pop()
            if name == "TUPLE":
                self.stack.append(tuple(items))
            else:
                self._set_items(items)
        elif name == "SETITEM":
            self._set_items([stack.pop(), stack.pop()][::-1])
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(_allowed(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_allowed(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        else:
            raise _Refused(f"uses the opcode {name}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str) or key in target:
                raise _Refused("has a dictionary whose keys are no text, or come twice")
            target[key] = value


def _allowed(module: Any, attribute: Any) -> _Global:
    name = f"{module}.{attribute}"
    if name not in _ALLOWED:
        raise _Refused(f"asks for {name[:80]!r}")
    return _Global(name)


def _called(function: Any, arguments: Any) -> Any:
    """What a call of ``function`` stands for."""
    name = function.name
    if name == _DTYPE:
        (code, align, copy) = arguments
        if code not in _FLOATS or align is not False or copy is not True:
            raise _Refused(f"has an array of dtype {str(code)[:20]!r}, not {', '.join(_FLOATS)}")
        return _DType(code)
    if name in _RECONSTRUCT:
        _check_empty(arguments)
        return _Array()
    if name in _FROM_BUFFER:
        data, dtype, shape, order = arguments
        return _array(shape, dtype, order == "F", data)
    if name == _JAX_ARRAY:
        function, empty, state, _ = arguments
        if function.name not in _RECONSTRUCT:
            raise _Refused(f"calls {function.name}")
        _check_empty(empty)
        array = _Array()
        _set_state(array, state)
        return array
    raise _Refused(f"calls {name}")


def _check_empty(arguments: Any) -> None:
    """The arguments by which numpy makes an array that its state then fills."""
    if arguments[0] != _Global(_NDARRAY):
        raise _Refused("makes something else than a numpy array")


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, _DType):
        _, target.order, *rest = state
        if target.order not in ("<", ">", "=", "|") or any(part is not None for part in rest[:3]):
            raise _Refused("has arrays with fields")
    elif isinstance(target, _Array):
        _, shape, dtype, is_fortran, data = state
        target.values = _array(shape, dtype, is_fortran, data).values
    else:
        raise _Refused(f"sets the state of a {type(target).__name__}")


def _array(shape: Any, dtype: Any, is_fortran: Any, data: Any) -> _Array:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
        raise TypeError
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has the shape {shape}")
    kind = dtype.numpy()
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and {kind.itemsize} bytes a number holds {len(data)} bytes")
    view: NDArray[np.floating] = np.ndarray(shape, kind, data, order="F" if is_fortran else "C")
    array = _Array()
    array.values = np.array(view, dtype=kind.newbyteorder("="), order="C")
    return array


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """Pairs (joined keys, array)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, _Array) and value.values is not None:
        yield "/".join(path), value.values
    else:
        raise _Refused(f"holds a {type(value).__name__.strip('_')} that is no array at '{'/'.join(path)}'")
