"""Makes Triton's interpreter compute bfloat16 as a GPU does, and 3.6's run on NumPy 2.4; importing this is enough.

The interpreter (3.6 and 3.9) keeps bfloat16 as bit patterns; it multiplies those as integers in `tl.dot`, and it cuts
where hardware rounds to nearest even when converting from float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot = InterpreterBuilder.create_dot
_cast_impl = InterpreterBuilder.cast_impl


def _widen(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _create_dot(self, _widen(a), _widen(b), *rest)


def _cast(self: InterpreterBuilder, x: TensorHandle, to: Any) -> TensorHandle:
    if x.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
        return _widen(x)
    if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return TensorHandle(_narrow(x.data), tl.bfloat16)
    return _cast_impl(self, x, to)


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.cast_impl = _cast

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch(tensor: Any, scope: Any) -> None:
    # A tensor of one element as a loop bound: NumPy 2.4 no longer makes an int of it unless it has no dimensions.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._patch_lang_tensor = _patch
