"""Which ways through a kernel are compiled: the conditions that its launcher decides, and what they come out as.

A condition of constants (`if HAS_BIAS`, `if H % BLOCK_K != 0`, `if bias is not None`) makes two kernels of one, and a
kernel that no case compiles is first compiled on somebody's GPU. `outcomes` goes through a kernel's text with a
launch's constants as Triton's compiler does: into the branch that is taken, and into the functions that are called on
it. Conditions on what is loaded do not count, nor do those on constants that the kernel's own text gives.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels" / "triton"

# Code also depends on these, without an `if`: masks of padded blocks, conversions, loops of one turn. Each must come
# out both ways in each kernel that has all the names.
FACTS = (
    "D < BLOCK_D",
    "H % BLOCK != 0",
    "HEADS < HEAD_BLOCK",
    "KEY_HEADS < KEY_BLOCK",
    "ROT // 2 < HALF",
    "D < CHANNELS",
    "D // WORDS < BLOCK_W",
    "V % BLOCK_N != 0",
    "STORED != OPERAND",
    "PIECE > 1",
    "JOIN > 1",
)
# (kernel, condition, what it never comes out as) -> why not
NO_TABLE = "a model that rotates no channel has no table and calls no rope"
NEVER: dict[tuple[str, str, bool], str] = {
    ("rope._forward", "ROT > 0", False): NO_TABLE,
    ("rope._rotate_and_write", "ROT > 0", False): NO_TABLE,
}


class _Tensor:
    """In the place of a tensor: it is not None, and nothing else is known of it."""

    def __bool__(self) -> bool:
        raise TypeError

    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: bool(self)


TENSOR = _Tensor()
Known = dict[str, tuple[Any, bool]]  # name -> value, and did the launcher choose it?
Outcome = tuple[str, str, bool]  # function, condition, what it came out as


def names(function: Any) -> tuple[str, str]:
    """(file, name) of what @triton.jit or the interpreter made."""
    return function.fn.__module__.rpartition(".")[2], function.fn.__name__


@functools.cache
def _body(fn: Any) -> ast.FunctionDef:
    found = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0]
    assert isinstance(found, ast.FunctionDef)
    return found


@functools.cache
def parameters(fn: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(fn).parameters)


@functools.cache
def _prepared(node: ast.expr) -> tuple[Any, frozenset[str]] | None:
    """An expression to evaluate and the names in it; None where it calls something."""
    parts = list(ast.walk(node))
    if any(isinstance(part, ast.Call | ast.Starred) for part in parts):
        return None
    used = frozenset(part.id for part in parts if isinstance(part, ast.Name))
    return compile(ast.unparse(node), "<kernel>", "eval"), used


def _constant(x: Any) -> bool:
    return isinstance(x, int | float | str) or type(x).__name__ in ("constexpr", "dtype")


class _Walk:
    """Through one function on one launch's constants."""

    def __init__(self, function: Any, known: Known, found: set[Outcome]) -> None:
        self.name, self.globals = function.fn.__name__, function.fn.__globals__
        self.known, self.found = known, found
        self.block(_body(function.fn).body)

    def value(self, node: ast.expr | None) -> tuple[Any, bool] | None:
        """(value, did the launcher choose a part of it?), or None where the compiler does not know it."""
        prepared = None if node is None else _prepared(node)
        if prepared is None:
            return None
        code, used = prepared
        values, chosen = {}, False
        for name in used:
            if name in self.known:
                values[name], of_launcher = self.known[name]
                chosen |= of_launcher
            elif _constant(self.globals.get(name)):
                values[name] = getattr(self.globals[name], "value", self.globals[name])
            else:
                return None
        try:
            return eval(code, {"__builtins__": {}}, values), chosen
        except (TypeError, AttributeError):
            return None

    def block(self, statements: Iterable[ast.stmt]) -> bool:
        """Does control leave the function in it, whatever is loaded?"""
        return any(self.statement(statement) for statement in statements)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return self.branch(node)
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.calls(part)
        if isinstance(node, ast.For):
            self.loop(node.iter)
            self.forget(node.target)
        if isinstance(node, ast.For | ast.While):
            self.block(node.body)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            self.assign(node)
        return isinstance(node, ast.Return)

    def branch(self, node: ast.If) -> bool:
        self.calls(node.test)
        decided = self.value(node.test)
        if decided is None:
            left = [self.block(part) for part in (node.body, node.orelse)]
            return all(left)
        value, chosen = decided
        if chosen:
            self.found.add((self.name, ast.unparse(node.test), bool(value)))
        return self.block(node.body if value else node.orelse)

    def loop(self, over: ast.expr) -> None:
        """A range that begins where the launcher says may be empty, and is then left out."""
        bounds = [self.value(bound) for bound in over.args] if isinstance(over, ast.Call) else []
        known = [bound for bound in bounds if bound is not None]
        if known and len(known) == len(bounds) > 1 and known[0][1]:
            runs = bool(range(*(value for value, _ in known)))
            self.found.add((self.name, ast.unparse(over), runs))

    def assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = None if isinstance(node, ast.AugAssign) else self.value(node.value)
        for target in targets:
            self.forget(target)
        if value is not None and isinstance(targets[0], ast.Name):
            self.known[targets[0].id] = value

    def forget(self, target: ast.expr) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                self.known.pop(part.id, None)

    def calls(self, node: ast.expr) -> None:
        """Into the kernels' functions that an expression calls."""
        for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
            called = self.globals.get(call.func.id) if isinstance(call.func, ast.Name) else None
            if not inspect.isfunction(getattr(called, "fn", None)):
                continue
            given = dict(zip(parameters(called.fn), call.args, strict=False))
            given |= {word.arg: word.value for word in call.keywords if word.arg}
            values = {name: self.value(x) for name, x in given.items()}
            _Walk(called, {name: x for name, x in values.items() if x is not None}, self.found)


def outcomes(kernel: Any, constants: Mapping[str, Any]) -> set[Outcome]:
    """What the conditions of a kernel and its functions come out as, given a launch's constants and absent tensors."""
    found: set[Outcome] = set()
    _Walk(kernel, {name: (value, True) for name, value in constants.items()}, found)
    for fact, (code, used) in _facts():
        if used <= constants.keys():
            value = eval(code, {"__builtins__": {}}, dict(constants))
            found.add((kernel.fn.__name__, fact, bool(value)))
    return found


@functools.cache
def _facts() -> list[tuple[str, Any]]:
    return [(fact, _prepared(ast.parse(fact, mode="eval").body)) for fact in FACTS]


def missed(compiled: Iterable[tuple[str, Any, Mapping[str, Any]]]) -> list[str]:
    """Conditions that come out one way alone in all that is compiled of a kernel for an architecture. `compiled`:
    architecture, kernel, what is known of its arguments."""
    found: dict[tuple[str, str], set[Outcome]] = {}  # by architecture and kernel
    for arch, kernel, constants in compiled:
        found.setdefault((arch, ".".join(names(kernel))), set()).update(outcomes(kernel, constants))
    said, used = [], set()
    for (arch, kernel), of_kernel in sorted(found.items()):
        for function, condition, value in sorted(of_kernel):
            if (function, condition, not value) in of_kernel:
                continue
            if (kernel, condition, not value) in NEVER:
                used.add((kernel, condition, not value))
                continue
            said.append(f"{kernel}, {arch}: `{condition}` of {function} is never {not value}")
    idle = sorted(NEVER.keys() - used)
    return said + [f"{kernel}: NEVER has `{text}`, {value} in vain" for kernel, text, value in idle]


def defined() -> set[tuple[str, str]]:
    """(file, name) of the kernels in kernels/triton: functions of @triton.jit that no other one names."""
    jit, named = set[tuple[str, str]](), set[tuple[str, str]]()
    for path in sorted(KERNELS.glob("*.py")):
        text = ast.parse(path.read_text()).body
        imports = [node for node in text if isinstance(node, ast.ImportFrom) and node.level == 1]
        home = {alias.name: node.module or "" for node in imports for alias in node.names}
        for node in text:
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                jit.add((path.stem, node.name))
                used = (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
                named |= {(home.get(name, path.stem), name) for name in used}
    return jit - named


def _is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) == "triton.jit"
