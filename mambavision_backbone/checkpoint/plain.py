"""What may lie in a pickle besides tensors: stand-ins that make plain data and nothing else.

torch's reader calls what a pickle names, with any arguments, and sets any state. numpy's own
constructors can be made to read foreign memory that way (an object array over bytes, a dtype with
false flags), so each name leads to a small function or class here that takes what numpy writes.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_CODE = re.compile(r"[biufcSU]\d+")  # plain numbers and text: no objects, no fields


def called(module: str, name: str) -> Callable[[Any], Any]:
    """Give a function or class the name by which the unpickler finds it."""

    def rename(thing: Any) -> Any:
        thing.__module__, thing.__name__, thing.__qualname__ = module, name, name
        return thing

    return rename


def refuse(what: str) -> pickle.UnpicklingError:
    """The error for something that this reader does not make."""
    return pickle.UnpicklingError(f"WeightsUnpickler error: {what} is not admitted")


@called("numpy", "dtype")
class _Dtype:
    """A dtype as a pickle tells it: a code, then the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        del align, copy  # numpy writes False and True
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise refuse(f"numpy's dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order; the rest is for fields and parts, which plain dtypes lack."""
        order, *parts = state[1:5]
        if order not in ("<", ">", "|", "=") or parts != [None, None, None]:
            raise refuse("a structured dtype")
        self.dtype = self.dtype.newbyteorder(order)

    def __reduce__(self) -> Any:
        return self.dtype.__reduce__()


@called("numpy", "ndarray")
class _Array(np.ndarray):
    """An array whose state is looked at; written again it is numpy's own."""

    def __new__(cls, *_args: Any) -> Any:
        raise refuse("calling numpy.ndarray")

    def __setstate__(self, state: Any) -> None:
        """Take shape, dtype and bytes."""
        version, shape, dtype, fortran, data = state
        if type(dtype) is not _Dtype or type(data) is not bytes:
            raise refuse("an array of objects")
        super().__setstate__((version, shape, dtype.dtype, fortran, data))

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: Any, shape: Any, code: Any) -> Any:
    if kind is not _Array or shape != (0,) or code not in (b"b", "b"):
        raise refuse("numpy's _reconstruct of anything but an array")
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(dtype: Any, data: Any) -> Any:
    if type(dtype) is not _Dtype or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise refuse("a numpy scalar of an object")
    return np.frombuffer(data, dtype.dtype)[0]


@called("_codecs", "encode")
def _encode(text: str, encoding: str) -> bytes:
    """Bytes are written as text by the protocol that torch.save uses."""
    if encoding != "latin1":
        raise refuse(f"the encoding {encoding!r}")
    return str.encode(text, "latin1")


@called("builtins", "bytes")
def _no_bytes() -> bytes:
    """Of an empty array."""
    return b""


def _numpy_constructors() -> list[Any]:
    """Under numpy 1's name and numpy 2's."""
    constructors = []
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar)):

            def construct(*args: Any, _function: Callable[..., Any] = function) -> Any:
                return _function(*args)

            constructors.append(called(module, name)(construct))
    return constructors


# Read from a pickle besides tensors and plain data; engine adds mmengine's curves.
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,  # timm's training arguments
    _encode,
    _no_bytes,
    _Dtype,
    _Array,
    *_numpy_constructors(),
]
