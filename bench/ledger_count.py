"""Counts the bytes that a piece of work moves at its full size, of Triton kernels and of torch's own operations.

- memory: each launch reads and writes each byte of a tensor at most once, as if a cache held all that it reads again.
- requested: what the programs ask for, again each time, as in bench/traffic.py. A cache serves a part of it.

A Triton kernel is interpreted for a few of its programs, spread over its grid, and what they load and store is scaled
to all of them; for more where they do not ask for about as many bytes, as attention's do not. The first and the last
program with work show what part of a tensor the launch is about. An operation of torch reads each of its tensors and
writes each result once; views are nothing. A product of torch is counted and not computed, and asks for what tiles of
128 x 256, the largest of Hopper's libraries, would load. The same counter takes the engine's kernels, other libraries'
and eager torch.
"""

import bisect
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PROGRAMS, UNEQUAL, ENDS = 4, 64, 8  # interpreted a launch; where they do unequal work; at an end of the grid, at most
EQUAL = 0.01  # the part of its bytes by which a program may differ from another: that of one row's target
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread over 0..1 and in step with no period of a grid
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
# What allocates, looks or renames: no bytes move.
FREE = (
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "view", "_unsafe_view",
    "is_same_size", "lift_fresh", "_local_scalar_dense",
)  # fmt: skip


FILLS = (
    "fill_", "zero_", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full",
    "new_ones", "arange",
)  # fmt: skip
PICKS = ("gather", "index", "index_select", "embedding")
TILE = (128, 256)  # rows and columns of a library's product that one block makes


@dataclass
class Work:
    """What one piece of work does."""

    memory: float = 0.0  # bytes
    requested: float = 0.0  # bytes
    flops: float = 0.0
    exponentials: float = 0.0
    launches: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # Triton's, by name


def _distinct(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each memory once."""
    seen: dict[Any, int] = {}
    for x in tensors:
        # storages on "meta" have no address; an expanded dimension is read once
        held = 1
        for size, stride in zip(x.shape, x.stride(), strict=True):
            held *= size if stride or not size else 1
        key = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride())
        seen[key] = held * x.element_size()
    return sum(seen.values())


class _Operations(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if func.namespace != "aten" or name in FREE or func.is_view:
            return func(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in PRODUCTS:
            self.work.flops += _product_flops(name, args)
            out = _not_computed(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in FILLS:
            read = []
        elif "out" in kwargs:
            others = {name: x for name, x in kwargs.items() if name != "out"}
            read = [x for x in tree_leaves((args, others)) if isinstance(x, Tensor)]
        elif name == "copy_":
            read = [x for x in read if x is not args[0]]
        elif name in PICKS:  # what is picked out is read, not the whole
            read = [x for x in read if not x.is_floating_point()] + written
        moved = _distinct(read) + _distinct(written)
        self.work.memory += moved
        self.work.requested += moved + (_read_again(name, args) if name in PRODUCTS else 0)
        self.work.launches += 1
        return out


def _product_flops(name: str, args: tuple[Any, ...]) -> float:
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    return 2.0 * a.numel() * b.shape[-1]


def _read_again(name: str, args: tuple[Any, ...]) -> float:
    """Bytes of a product's operands that its tiles load beyond the first time."""
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    rows, columns = a.shape[-2], b.shape[-1]
    a_again, b_again = -(-columns // TILE[1]) - 1, -(-rows // TILE[0]) - 1
    return float(a.numel() * a.element_size() * a_again + b.numel() * b.element_size() * b_again)


def _not_computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory of the right shape, with what it happens to hold."""
    if "out" in kwargs:
        out: Tensor = kwargs["out"]
        wanted = next((x for x in args if isinstance(x, torch.dtype)), args[0].dtype)
        if out.dtype != wanted:
            raise RuntimeError(f"a product into {out.dtype}: torch wants {wanted}")
        return out
    shapes = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
    out = func(*shapes[0], **shapes[1])
    device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
    return out if device.type == "meta" else torch.zeros(out.shape, dtype=out.dtype, device=device)


class _Launch:
    """What the interpreted programs of one launch ask for, by the tensor they ask."""

    def __init__(self, arguments: list[Any]) -> None:
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.numel()]
        self.starts = sorted({x.untyped_storage().data_ptr() for x in tensors})
        self.read = [0.0] * len(self.starts)
        self.written = [0.0] * len(self.starts)
        self.first, self.last = [1 << 62] * len(self.starts), [0] * len(self.starts)
        self.flops = self.exponentials = 0.0
        self.counts = True
        self.met: set[int] = set()  # tensors that were asked for since this was cleared

    @property
    def asked(self) -> float:
        return sum(self.read) + sum(self.written)

    @property
    def used(self) -> set[int]:
        """Tensors that the programs counted so far ask for."""
        return {at for at in range(len(self.starts)) if self.read[at] + self.written[at]}

    def ask(self, asked: list[float], pointers: Any, mask: Any) -> None:
        """A load or store: each address that its mask lets through, once."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        live = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)]
        if live.size:
            at = bisect.bisect_right(self.starts, int(live.flat[0])) - 1
            self.met.add(at)
            width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.first[at] = min(self.first[at], int(live.min()))
            self.last[at] = max(self.last[at], int(live.max()) + width)
            if self.counts:
                asked[at] += np.unique(live).size * width

    def add_to(self, work: Work, share: float, name: str) -> None:
        for asked in (self.read, self.written):
            work.requested += share * sum(asked)
            # at most what lies between the first and the last address that was asked for
            spans = [last - first for first, last in zip(self.first, self.last, strict=True)]
            work.memory += sum(
                min(share * x, max(span, 0)) for x, span in zip(asked, spans, strict=True)
            )
        work.flops += share * self.flops
        work.exponentials += share * self.exponentials
        work.launches += 1
        work.kernels[name] = work.kernels.get(name, 0) + 1


@contextmanager
def _watched(builder: Any, launch: _Launch) -> Iterator[None]:
    """The interpreter's builder tells `launch` what it is asked to do."""
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def loading(pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        mask.data = mask.data.astype(bool)  # a GPU takes integers
        launch.ask(launch.read, pointers, mask)
        return load(pointers, mask, *others, **named)

    def storing(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        mask.data = mask.data.astype(bool)
        launch.ask(launch.written, pointers, mask)
        return store(pointers, value, mask, *others)

    def adding(operation: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        launch.ask(launch.read, pointers, mask)
        launch.ask(launch.written, pointers, mask)
        return atomic(operation, pointers, value, mask, *others)

    def dotting(a: Any, b: Any, *others: Any) -> Any:
        launch.flops += launch.counts * 2.0 * a.data.size * b.data.shape[-1]
        return dot(a, b, *others)

    def exponential(original: Any) -> Any:
        def run(x: Any) -> Any:
            launch.exponentials += launch.counts * x.data.size
            return original(x)

        return run

    dot = builder.create_dot
    patched = {
        "create_masked_load": loading,
        "create_masked_store": storing,
        "create_atomic_rmw": adding,
        "create_dot": dotting,
        "create_exp": exponential(builder.create_exp),
        "create_exp2": exponential(builder.create_exp2),
    }
    for name, replacement in patched.items():
        setattr(builder, name, replacement)
    try:
        yield
    finally:
        for name in patched:
            delattr(builder, name)  # the instance's own; the class's methods are seen again


def _scalar(value: float) -> Any:
    """A float argument as a GPU's kernel gets it, a float32 with a tensor's methods."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return tl.core.tensor(TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


def _places(total: int) -> list[int]:
    """Up to UNEQUAL programs of `total`, each once; any first few of them are spread over all."""
    found: dict[int, None] = {}
    at = 0.5
    while len(found) < min(total, UNEQUAL):
        found.setdefault(int(total * at))
        at = (at + GOLDEN) % 1
    return list(found)


def _sampling(work: Work) -> Callable[..., None]:
    """GridExecutor.__call__ for some of the programs, with what they did scaled to all."""
    from triton.runtime import interpreter

    def call(self: Any, *given: Any, **named: Any) -> None:
        names = inspect.getfullargspec(self.fn)
        named = {k: v for k, v in named.items() if k in names.args or k in names.kwonlyargs}
        modes = torch.utils._python_dispatch._disable_current_modes()
        modes.__enter__()  # what the interpreter does with tensors is not the kernel's work
        scope = interpreter._patch_lang(self.fn)
        try:
            held, held_named = self._init_args_hst(given, named)
            bound = inspect.getcallargs(self.fn, *held, **held_named)
            launch = _Launch(list(bound.values()))
            convert, builder = interpreter._implicit_cvt, interpreter.interpreter_builder
            bound = {
                k: v if k in self.constexprs else _scalar(v) if isinstance(v, float) else convert(v)
                for k, v in bound.items()
            }
            grid = tuple(self.grid(bound) if callable(self.grid) else self.grid)
            grid += (1,) * (3 - len(grid))
            total = grid[0] * grid[1] * grid[2]
            builder.set_grid_dim(*grid)

            def run(at: int) -> float:  # the bytes that program `at` asks for
                before = launch.asked
                rest, z = divmod(at, grid[2])
                builder.set_grid_idx(*divmod(rest, grid[1]), z)
                self.fn(**bound)
                return launch.asked - before

            asked: list[float] = []
            with _watched(builder, launch):
                for at in _places(total):
                    if len(asked) == PROGRAMS and max(asked) - min(asked) <= EQUAL * max(asked):
                        break
                    asked.append(run(at))
                # the ends show what memory is touched; programs there may have no work, or none on some tensor
                launch.counts = False
                for ends in range(total), range(total)[::-1]:
                    launch.met.clear()
                    for at in ends[:ENDS]:
                        run(at)
                        if launch.met >= launch.used:
                            break
        finally:
            scope.restore()
            modes.__exit__(None, None, None)
        launch.add_to(work, total / max(len(asked), 1), self.fn.__name__)

    return call


@contextmanager
def counting() -> Iterator[Work]:
    """Counts what the block does; kernels run for some programs only, so that results are not to be used."""
    work = Work()
    from engine.kernels.triton import _interpreter

    if not _interpreter.active():  # eager torch needs no interpreter
        with _Operations(work):
            yield work
        return
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    original = executor.__call__
    executor.__call__ = _sampling(work)
    try:
        with _Operations(work):
            yield work
    finally:
        executor.__call__ = original
