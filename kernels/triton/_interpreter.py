"""Mends Triton's interpreter, which is silently wrong in bfloat16: it holds such numbers as 16-bit integers and then
adds, multiplies and compares those integers, cuts float32 off instead of rounding it, and skips device_assert.

With the patch a bfloat16 operation is the float32 one, rounded to nearest even, as on a GPU. What cannot be mended in
one place (reductions and scans of bfloat16, which the kernels do in float32 anyway) is an error instead of a wrong
number. `active()` says whether kernels are interpreted at all; on a GPU nothing here runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def active() -> bool:
    """Are kernels that are decorated now interpreted? (TRITON_INTERPRET=1)"""
    return bool(triton.knobs.runtime.interpret)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32 numbers."""
    wide = np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers as bfloat16 bits, rounded to nearest even; any NaN becomes the quiet one."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(
        np.uint64
    )  # 64 bits: the carry of the largest must not wrap
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bfloat16(handle: Any) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


@functools.cache
def patch() -> None:
    """Patches the interpreter of the installed triton, once. Raises where its parts have moved."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    for name in (
        "create_dot",
        "cast_impl",
        "create_fp_to_fp",
        "binary_op",
        "unary_op",
        "create_fma",
    ):
        wrapper = globals()[f"_{name}"]
        setattr(builder, name, wrapper(getattr(builder, name), handle))
    _patch_language_once(interpreter)
    for ops in (interpreter.ReduceOps, interpreter.ScanOps):
        ops.apply_impl = _refuse_bfloat16(ops.apply_impl)
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=True)
    interpreter.interpreter_builder.options = options


def _patch_language_once(interpreter: Any) -> None:
    """Patches each module of triton.language once a launch: the interpreter does it again, for 0.8 ms, at each call of
    a function by a kernel, which was a quarter of the time of attention."""
    patch_lang, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: list[frozenset[str]] = []  # of the launch at hand

    @functools.cache
    def modules(function: Any) -> frozenset[str]:
        values = function.__globals__.values()
        return frozenset(m.__name__ for m in (tl, tl.core) if any(value is m for value in values))

    def once(function: Any) -> Any:
        if patched and modules(function) <= patched[-1]:
            return interpreter._LangPatchScope()  # that restores nothing
        if patched:
            patched[-1] |= modules(function)
        return patch_lang(function)

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        patched.append(frozenset())
        try:
            run(self, *arguments, **named)
        finally:
            patched.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


def _float32(handle: Callable[..., Any], x: Any) -> Any:
    return handle(widen(x.data), tl.float32) if _is_bfloat16(x) else x


def _create_dot(original: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *others: Any) -> Any:
        return original(self, _float32(handle, a), _float32(handle, b), d, *others)

    return create_dot


def _cast_impl(original: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    """Any cast from or to bfloat16 goes through float32."""

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kind = target.scalar
        if kind == source.dtype.scalar:
            return source
        if _is_bfloat16(source):
            source = _float32(handle, source)
            return source if kind == tl.float32 else original(self, source, target)
        if kind == tl.bfloat16:
            wide = source.data.astype(np.float32)
            return handle(narrow(wide), tl.bfloat16)
        return original(self, source, target)

    return cast_impl


def _create_fp_to_fp(
    original: Callable[..., Any], handle: Callable[..., Any]
) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return self.cast_impl(source, target)
        return original(self, source, target, rounding)

    return create_fp_to_fp


def _binary_op(original: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if not _is_bfloat16(a):
            return original(self, a, b, operation)
        result = operation(widen(a.data), widen(b.data))
        if operation in COMPARISONS:
            return handle(result, tl.int1)
        return handle(narrow(result), tl.bfloat16)

    return binary_op


def _unary_op(original: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, a: Any, operation: Any) -> Any:
        if not _is_bfloat16(a):
            return original(self, a, operation)
        return handle(narrow(operation(widen(a.data))), tl.bfloat16)

    return unary_op


def _to_odd(number: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A rounded number whose last bit says that something was lost: rounding it on is then rounding once."""
    even = number.view(f"u{number.itemsize}") % 2 == 0
    lost = np.isfinite(number) & (error != 0) & even
    side = np.copysign(np.inf, error).astype(number.dtype)
    return np.where(lost, np.nextafter(number, side), number)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of bfloat16 bits, rounded once. The product is exact in float64; the sum's error is Knuth's."""
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = widen(x).astype(np.float64) * widen(y), widen(z).astype(np.float64)
        total = product + addend
        back = total - product
        total = _to_odd(total, (product - (total - back)) + (addend - back))
        single = total.astype(np.float32)
        return narrow(_to_odd(single, total - single))


def _create_fma(original: Callable[..., Any], handle: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bfloat16(z):
            return original(self, x, y, z)
        return handle(_fma(x.data, y.data, z.data), tl.bfloat16)

    return create_fma


def _refuse_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: Any) -> Any:
        if any(_is_bfloat16(x.handle) for x in inputs):
            raise TypeError(
                "a reduction or scan of bfloat16: cast to float32 first, as a GPU kernel should"
            )
        return original(self, inputs)

    return apply_impl
