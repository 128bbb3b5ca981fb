"""What is to be compiled: the launches that each case of bench/gpu would make, as triton's runtime would see them.

Every kernel is compiled for every architecture, every dtype, and every row of its tables: a row that no shape takes is
forced on one, and a row that no launcher can take is a failure. Left out: a shape that takes the row of one before it,
in dtypes other than the first of its case; and what differs from another by the number of a loop's turns alone, whose
record then says both cases. Variations come last, each in its one dtype.

A case's launcher runs on "meta" tensors with an architecture's column of the tables; an observer takes each launch and
says that it is not to run. Arguments are specialised by Triton's own binder (divisible by 16, equal to 1, on AMD within
2 GB), since other facts would make another kernel.
"""

import functools
import hashlib
import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import aot_code, aot_gates, aot_paths, gpu
from bench.gpu import DTYPES, Case, Variation

# Sizes that say how often a loop turns: variants that differ in the width alone, or in the vocabulary alone, are one.
TURNS = (("H",), ("V", "TILES"))
TABLES = Path(__file__).parents[1] / "kernels" / "configs"


@dataclass
class Variant:
    """One compilation: a kernel with its argument types, constants, options and architecture."""

    op: str
    kernel: str
    arch: str
    dtype: str
    function: Any  # what @triton.jit made
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    cases: list[str] = field(default_factory=list)  # names of the op's cases that launch it

    @property
    def name(self) -> str:
        return f"{self.op} {self.kernel} {self.dtype} {self.arch} {', '.join(self.cases)}"

    @property
    def known(self) -> dict[str, Any]:
        """The constants by name, and which tensors there are, as bench/aot_paths.py asks for them."""
        found = {}
        for at, (name, kind) in enumerate(self.signature.items()):
            value = self.constants.get((at,), aot_paths.TENSOR if kind.startswith("*") else 0)
            # an integer that happens to be 1 is no constant of the kernel's text
            if self.function.params[at].is_constexpr or value is None or value is aot_paths.TENSOR:
                found[name] = value
        return found

    @functools.cached_property
    def types(self) -> str:
        """The specialised signature, readable: `x:*bf16/16 n:i32 one:1 BLOCK=64`."""
        parts = []
        for at, (name, kind) in enumerate(self.signature.items()):
            facts = "".join(f"/{value}" for _, value in self.attributes.get((at,), []))
            if kind == "constexpr":
                parts.append(f"{name}={self.constants[(at,)]}")
            else:
                parts.append(f"{name}:{kind}{facts}")
        return " ".join(parts)

    def without(self, sizes: Sequence[str]) -> str:
        """Of everything but these sizes, of which it says how the kernel's conditions come out; and but the alignment,
        where no load need be wide."""
        narrow = (self.op, self.kernel) in aot_gates.NARROW
        said = self.types.replace("/16", "") if narrow else self.types
        types = [x for x in said.split() if x.partition("=")[0] not in sizes]
        ways = sorted(aot_paths.outcomes(self.function, self.known))
        return f"{sizes} {self.op} {self.kernel} {self.arch} {types} {self.options} {ways}"

    @functools.cached_property
    def key(self) -> str:
        """Of everything that the result follows from, the readers of the code included."""
        import triton

        options = re.sub(r"'/[^']*/", "'", str(self.options))  # where triton lies does not matter
        parts = [self.function.cache_key, self.types, self.arch, options, triton.__version__]
        text = "\n".join(map(str, [*parts, Path(aot_code.__file__).read_text()]))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _backend(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget(*aot_code.MACHINES[arch].target))


@functools.cache
def _binder(function: Any, arch: str) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(function.signature, function.params, _backend(arch))


def specialise(
    function: Any, given: Sequence[Any], named: dict[str, Any], arch: str, op: str, dtype: str
) -> Variant:
    """The variant that triton's runtime would compile for `function[grid](*given, **named)` on an architecture."""
    named = {**named, "debug": False}
    bound, types, extra = _binder(function, arch)(*given, **named)
    packed = function._pack_args(_backend(arch), named, bound, types, extra)
    options, signature, constants, attributes = packed
    kernel = function.fn.__name__
    return Variant(
        op, kernel, arch, dtype, function, signature, constants, attributes, options.__dict__
    )


def specialised(launch: Any, arch: str, op: str, dtype: str) -> Variant:
    """Of a launch that an observer saw."""
    config = launch.config
    named = {
        **launch.constants,
        **config.blocks,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return specialise(launch.kernel, launch.arguments, named, arch, op, dtype)


Place = tuple[str, str, int]  # table, column, index of a row


class _Row(dict[str, Any]):
    """A row of a table that says when a launcher takes it."""

    def __init__(self, row: dict[str, Any], place: Place, taken: set[Place], **other: Any) -> None:
        super().__init__(row, **other)
        self.place, self._taken = place, taken

    def __getitem__(self, name: str) -> Any:
        if name == "num_warps":
            self._taken.add(self.place)
        return super().__getitem__(name)


class Tables:
    """The tables of kernels/configs, watched: which rows did launchers take? `force` leaves a table one row."""

    def __init__(self) -> None:
        from engine.kernels.triton import _launch

        self.load = _launch.table
        self.read: dict[str, dict[str, list[_Row]]] = {}  # table -> column -> rows
        self.taken: set[Place] = set()
        self.forced: tuple[str, int] | None = None
        self.latest: set[Place] = set()  # by the last case

    def table(self, op: str) -> dict[str, list[_Row]]:
        if op not in self.read:
            self.read[op] = {
                name: [_Row(row, (op, name, at), self.latest) for at, row in enumerate(rows)]
                for name, rows in self.load(op).items()
            }
        columns = self.read[op]
        if self.forced and self.forced[0] == op:
            at = self.forced[1]
            return {
                name: [_Row(rows[at], rows[at].place, self.latest, up_to=None)]
                for name, rows in columns.items()
                if at < len(rows)
            }
        return columns

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Launchers read these tables; `latest` are the rows that they take inside."""
        from engine.kernels.triton import _launch

        read, _launch.table = _launch.table, self.table
        self.latest.clear()
        try:
            yield
        finally:
            _launch.table = read
            self.taken |= self.latest

    def untaken(self, arch: str) -> list[tuple[str, int]]:
        """(table, index) of the rows of an architecture that nothing took."""
        places = [row.place for columns in self.read.values() for row in columns.get(arch, [])]
        return sorted((op, at) for op, name, at in places if (op, name, at) not in self.taken)


def launches(
    case: Case | Variation,
    arch: str,
    dtype: str,
    tables: Tables | None = None,
    shape: dict[str, int] | None = None,
) -> list[Any]:
    """What a case's launcher would start on an architecture. Nothing runs."""
    from engine.kernels.triton import _launch

    seen: list[Any] = []

    def see(launch: Any) -> bool:
        seen.append(launch)
        return False

    tokens = _launch.observer.set(see), _launch.column.set(arch)
    try:
        with tables.watched() if tables else nullcontext():
            case.run(*case.make("meta", DTYPES[dtype], **(shape or case.full)))
    finally:
        _launch.observer.reset(tokens[0])
        _launch.column.reset(tokens[1])
    return seen


def _dtypes(case: Case) -> tuple[str, ...]:
    """A case's own, and float16 where it takes the other 16-bit type."""
    extra = ("float16",) if "bfloat16" in case.dtypes else ()
    return tuple(dict.fromkeys(case.dtypes + extra))


class Plan:
    """Every variant once, and what went wrong in a launcher."""

    def __init__(self) -> None:
        self.found: dict[str, Variant] = {}
        self.errors: list[str] = []
        self.turning: dict[str, Variant] = {}  # by what they are without the sizes of TURNS
        self.rows: dict[
            str, set[Place]
        ] = {}  # dtype -> rows that a variant of it was launched with

    def alike(self, variant: Variant) -> Variant:
        """A planned variant that this one differs from by the number of a loop's turns alone; else itself, planned."""
        kept = variant
        for sizes in TURNS:
            kept = self.turning.setdefault(variant.without(sizes), kept)
        if kept is variant:
            self.found[f"{variant.op} {variant.key}"] = variant
        return kept

    def add(
        self, case: Case | Variation, arch: str, dtype: str, tables: Tables, label: str = ""
    ) -> None:
        """A case's variants. In a dtype that is not its first, one that takes no other rows than those before it adds
        none of a kernel that has one."""
        name = case.name + label
        try:
            started = launches(case, arch, dtype, tables)
            variants = [specialised(launch, arch, case.op, dtype) for launch in started]
        except Exception as error:  # a broken launcher must not hide the other kernels
            self.errors.append(f"{case.op}, {name}, {dtype}, {arch}: {error!r}")
            return
        rows = self.rows.setdefault(dtype, set())
        another = not tables.latest <= rows
        rows |= tables.latest
        planned = {(v.op, v.kernel, v.arch, v.dtype) for v in self.found.values()}
        for variant in variants:
            again = not another and (case.op, variant.kernel, arch, dtype) in planned
            if dtype != case.dtypes[0] and again and f"{case.op} {variant.key}" not in self.found:
                continue
            kept = self.found.get(f"{case.op} {variant.key}") or self.alike(variant)
            if name not in kept.cases and (not label or kept is variant):
                kept.cases.append(name)


def _cases(errors: list[str]) -> dict[str, list[Case | Variation]]:
    """All by op. A module that cannot be imported is an error of its own and hides no other."""
    found: dict[str, list[Case | Variation]] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(gpu.__path__)):
        try:
            loaded = importlib.import_module(f"bench.gpu.{module}")
            listed = [*loaded.CASES, *getattr(loaded, "VARIATIONS", [])]
        except Exception as error:
            errors.append(f"bench/gpu/{module}.py: {error!r}")
            continue
        for case in listed:
            found.setdefault(case.op, []).append(case)
    return found


def plan(
    only: Sequence[str] = (), archs: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> tuple[list[Variant], list[str]]:
    """All cases on their full shapes; then the rows of the tables that those sizes did not take."""
    made, read = Plan(), set[str]()
    for op, of_op in _cases(made.errors).items():
        for arch in archs or aot_code.MACHINES:
            if not only or op in only:
                read |= _add_op(made, of_op, arch, dtypes)
    if not only:
        files = {path.stem for path in TABLES.glob("*.json")}
        made.errors += [f"kernels/configs/{name}.json: not read" for name in sorted(files - read)]
    return list(made.found.values()), made.errors


def _add_op(
    made: Plan, listed: list[Case | Variation], arch: str, dtypes: Sequence[str]
) -> set[str]:
    """The variants of an op; the names of the tables that it reads."""
    tables, of_op = Tables(), [case for case in listed if isinstance(case, Case)]
    for case in of_op:
        for dtype in _dtypes(case):
            if not dtypes or dtype in dtypes:
                made.add(case, arch, dtype, tables)
    for table, at in tables.untaken(arch):
        tables.forced = (table, at)
        for dtype in dict.fromkeys(dtype for case in of_op for dtype in _dtypes(case)):
            if not dtypes or dtype in dtypes:
                _force_row(made, of_op, arch, dtype, tables, f", row {at} of {table}")
    if not dtypes:
        made.errors += [
            f"kernels/configs/{table}.json, {arch}: no case can take row {at}"
            for table, at in tables.untaken(arch)
        ]
    for variation in listed:
        # with tables of its own: a row that it alone takes is none that every dtype has been through
        if isinstance(variation, Variation) and variation.dtype in (dtypes or DTYPES):
            made.add(variation, arch, variation.dtype, Tables())
    return set(tables.read)


def _force_row(
    made: Plan, of_op: list[Case], arch: str, dtype: str, tables: Tables, label: str
) -> None:
    """On the op's cases, up to the first that the row makes another kernel for."""
    for case in of_op:
        before = len(made.found)
        if dtype in _dtypes(case):
            made.add(case, arch, dtype, tables, label)
        if len(made.found) > before:
            return
