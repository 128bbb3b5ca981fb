"""Reads compiled kernels: registers, spills, loops, tensor-core instructions and wide loads, from NVIDIA's SASS and
AMD's assembly.

An instruction is in a loop where the control flow can come back to it: it lies in a cycle of the graph of basic
blocks, or in a subroutine that such a cycle calls. A backward branch alone proves nothing, since ptxas puts cold code
behind the end and branches back from it.
"""

import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Summary = dict[str, Any]


@dataclass(frozen=True)
class Instruction:
    text: str  # as written, without address and comment; branch targets are "L<index>"
    name: str  # the opcode with its modifiers: LDG.E.128, v_mfma_f32_32x32x8_bf16
    target: int | None = None  # index of the instruction it may jump to
    ends: bool = False  # does not go on to the next instruction
    call: bool = False


@dataclass
class Code:
    """What the assembler made of one kernel."""

    instructions: list[Instruction]
    in_loop: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.in_loop = _loops(self.instructions)

    def count(self, pattern: str, looped: bool = False) -> int:
        """Instructions whose opcode matches; with `looped` those in a loop only."""
        return sum(
            bool(re.match(pattern, i.name)) and (inside or not looped)
            for i, inside in zip(self.instructions, self.in_loop, strict=True)
        )

    @property
    def has_loop(self) -> bool:
        return any(self.in_loop)

    @property
    def hash(self) -> str:
        """Of the instructions with registers renumbered by first use: another allocation alone is the same code."""
        text = "\n".join(_renumbered(i.text for i in self.instructions))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_REGISTER = re.compile(r"\b(UR|UP|R|P|B)(\d+)\b")


def _renumbered(lines: Iterable[str]) -> list[str]:
    """NVIDIA's registers only; AMD's ranges v[0:3] would say another thing with other numbers."""
    seen: dict[str, dict[str, str]] = {}

    def number(match: re.Match[str]) -> str:
        bank = seen.setdefault(match[1], {})
        return match[1] + bank.setdefault(match[2], str(len(bank)))

    return [_REGISTER.sub(number, line) for line in lines]


def _strongly_connected(edges: Sequence[Sequence[int]]) -> list[int]:
    """The component's number of each node (Tarjan, without recursion)."""
    order, low, component = [-1] * len(edges), [0] * len(edges), [-1] * len(edges)
    stack: list[int] = []
    visited = found = 0
    for root in range(len(edges)):
        work = [(root, 0)] if order[root] < 0 else []
        while work:
            node, i = work.pop()
            if order[node] < 0:
                order[node] = low[node] = visited
                visited += 1
                stack.append(node)
            for j in range(i, len(edges[node])):
                other = edges[node][j]
                if order[other] < 0:
                    work += [(node, j), (other, 0)]
                    break
                if component[other] < 0:
                    low[node] = min(low[node], low[other])
            else:
                if low[node] == order[node]:
                    while component[node] < 0:
                        component[stack.pop()] = found
                    found += 1
    return component


def _reachable(edges: Sequence[Sequence[int]], starts: Iterable[int]) -> set[int]:
    seen, work = set(), list(starts)
    while work:
        node = work.pop()
        if node not in seen:
            seen.add(node)
            work += edges[node]
    return seen


def _loops(instructions: Sequence[Instruction]) -> list[bool]:
    """Of each instruction: can control come back to it? (Every instruction is its own basic block.)"""
    edges: list[list[int]] = []
    for at, i in enumerate(instructions):
        follows = [at + 1] if not i.ends and at + 1 < len(instructions) else []
        jumps = [i.target] if i.target is not None and not i.call else []
        edges.append(follows + jumps)
    component = _strongly_connected(edges)
    sizes = [0] * (max(component, default=-1) + 1)
    for number in component:
        sizes[number] += 1
    # `BRA .` behind the end is padding, not a loop: a loop has at least two instructions
    looped = [sizes[number] > 1 for number in component]
    called = {i.target for i, inside in zip(instructions, looped, strict=True) if inside and i.call}
    for at in _reachable(edges, (target for target in called if target is not None)):
        looped[at] = True
    return looped


# --- NVIDIA ---

TOOLS = "backends/nvidia/bin"
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_LITERAL = re.compile(r"\b0x[0-9a-f]+")
_JUMPS = ("BRA", "JMP", "CALL", "BSSY", "BRX", "WARPSYNC")  # name a place of the code
EXECUTABLE = 4  # of an ELF section's flags
RAW = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}  # nvdisasm's names


def tool(name: str) -> str:
    """A program of CUDA that triton's wheel brings."""
    import triton

    return str(Path(triton.__file__).parent / TOOLS / name)


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        run = subprocess.run(
            [tool("cuobjdump"), option, file.name], check=True, capture_output=True, text=True
        )
        return run.stdout
    finally:
        os.unlink(file.name)


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin's one function: its ELF section that is executable."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count = struct.unpack_from("<HH", cubin, 0x3A)
    found = []
    for at in range(table, table + count * entry, entry):
        _, _, flags, _, offset, size = struct.unpack_from("<IIQQQQ", cubin, at)
        if flags & EXECUTABLE:
            found.append(cubin[offset : offset + size])
    if len(found) != 1:
        raise ValueError(f"got a cubin of {len(found)} functions, want 1")
    return found[0]


def disassembled(cubins: Sequence[bytes], arch: str) -> list[Code]:
    """The code of each cubin, all by one call: a call takes 0.4 s, whatever it is given.

    nvdisasm takes one file, so it gets the instructions of all one behind the other, and each kernel's addresses are
    counted from its own start again. Raises CalledProcessError where something is no instruction of the architecture.
    """
    parts = [_machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(parts))
        file.flush()
        command = [tool("nvdisasm"), "--binary", RAW[arch], file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = _lines(text)
    found, start = [], 0
    for part in parts:
        end = start + len(part)
        own = [line for line in lines if start <= line[0] < end]
        found.append(Code(_sass_instructions([_moved(*line, start, end) for line in own])))
        start = end
    return found


def _moved(address: int, line: str, start: int, end: int) -> tuple[int, str]:
    """A line as it were if its kernel, of addresses start..end, began at 0."""

    def moved(literal: re.Match[str]) -> str:
        number = int(literal[0], 16)
        return hex(number - start) if start <= number < end else literal[0]

    words = _GUARD.sub("", line).split()
    jumps = bool(words) and words[0].split(".")[0] in (*_JUMPS, "RET")
    return address - start, _LITERAL.sub(moved, line) if jumps else line


def _lines(text: str) -> list[tuple[int, str]]:
    return [(int(m[1], 16), m[2]) for line in text.splitlines() if (m := _SASS.match(line))]


def sass(text: str) -> Code:
    """A function as a disassembler prints it."""
    return Code(_sass_instructions(_lines(text)))


def _sass_instructions(lines: Sequence[tuple[int, str]]) -> list[Instruction]:
    index = {address: at for at, (address, _) in enumerate(lines)}
    found = []
    for _, line in lines:
        body = _GUARD.sub("", line)
        name = body.split()[0] if body.split() else ""
        base, target, text = name.split(".")[0], None, line
        if base in _JUMPS:
            for literal in _LITERAL.findall(body)[::-1]:
                if int(literal, 16) in index:
                    target = index[int(literal, 16)]
                    text = line.replace(literal, f"L{target}")
                    break
        # no guard, no predicate, and not a branch of the threads that diverged
        always = body == line and not re.search(r"\bU?P\d|\.(DIV|CONV)\b", body)
        ends = base in ("EXIT", "RET") and body == line or base in ("BRA", "JMP", "BRX") and always
        # BSSY only names where BSYNC meets: control does not jump from here
        jumps = target if base != "BSSY" else None
        found.append(Instruction(text, name, jumps, ends, call=base == "CALL"))
    return found


def resources(text: str) -> dict[str, int]:
    """REG, STACK, ... of the first function of `cuobjdump --dump-resource-usage`."""
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


NVIDIA_LOCAL = r"(LDL|STL)\b"
NVIDIA_TENSOR = r"(HGMMA|HMMA|UTC\w*MMA)\b"
NVIDIA_WIDE = r"(LDG\.|LDGSTS\.)\S*\b(128|256)\b|UTMALDG|UBLKCP"


def nvidia(cubins: Sequence[bytes], arch: str) -> list[Summary]:
    """What the kernel of each cubin uses and does."""
    return [_nvidia(*pair) for pair in zip(cubins, disassembled(cubins, arch), strict=True)]


def _nvidia(cubin: bytes, code: Code) -> Summary:
    used = resources(cuobjdump("--dump-resource-usage", cubin))
    return {
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": code.count(NVIDIA_LOCAL),
        "local_in_loop": code.count(NVIDIA_LOCAL, looped=True),
        "loop": code.has_loop,
        "hgmma": code.count(r"(HGMMA|UTC\w*MMA)\b"),
        "mma": code.count(r"HMMA\b"),
        "loads": code.count(r"(LDG|LDGSTS|UTMALDG|UBLKCP)\b"),
        "wide_loads": code.count(NVIDIA_WIDE),
        "instructions": len(code.instructions),
        "hash": code.hash,
    }


# --- AMD ---

_LABEL = re.compile(r"^(\.?\w+):")
AMD_LOCAL = (
    r"scratch_(load|store)"  # spills; those to accumulator registers stay in the registers' count
)


def amd_code(text: str) -> Code:
    """The kernel in AMD assembly as LLVM prints it."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for raw in text.splitlines():
        line = raw.split(";")[0].split("//")[0].rstrip()
        if match := _LABEL.match(line):
            labels[match[1]] = len(lines)
            if match[1].startswith(".Lfunc_end"):
                break
        elif line.startswith("\t") and line.strip() and not line.strip().startswith("."):
            lines.append(" ".join(line.split()))
    found = []
    for line in lines:
        name, *operands = line.split(maxsplit=1)
        target = labels.get(operands[0]) if operands and "branch" in name else None
        text = line if target is None else f"{name} L{target}"
        found.append(Instruction(text, name, target, name in ("s_branch", "s_endpgm")))
    return Code(found)


def amd(text: str) -> Summary:
    """What a gfx9 kernel's assembly says that it uses and does; registers: the vector ones, with accumulators."""

    def said(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    code = amd_code(text)
    return {
        "registers": said("vgpr_count"),
        "stack": said("private_segment_fixed_size"),
        "local": max(code.count(AMD_LOCAL), said("vgpr_spill_count")),
        "local_in_loop": code.count(AMD_LOCAL, looped=True),
        "loop": code.has_loop,
        "hgmma": 0,
        "mma": code.count(r"v_mfma"),
        "loads": code.count(r"(global|buffer|flat)_load"),
        "wide_loads": code.count(r"(global|buffer|flat)_load_dwordx4"),
        "instructions": len(code.instructions),
        "hash": code.hash,
    }


# --- occupancy ---


@dataclass(frozen=True)
class Machine:
    """One multiprocessor (NVIDIA) or compute unit (AMD), and what one block may have of it.

    NVIDIA: CUDA C++ programming guide, table of compute capabilities. gfx942: AMD Instinct MI300 ISA guide; 512 vector
    registers a lane, shared between the waves of each of 4 SIMD units.
    """

    target: tuple[str, int | str, int]  # triton's GPUTarget
    shared: int  # bytes
    shared_block: int  # bytes that a block may have
    reserved: int  # bytes that each block costs beside its own
    warps: int
    blocks: int
    registers: int  # a thread's, times warp width, times warps, of the whole
    granule: int  # registers of a thread are given in this many


KB = 1024
MACHINES = {
    "sm_80": Machine(("cuda", 80, 32), 164 * KB, 163 * KB, KB, 64, 32, 65536, 8),
    "sm_90": Machine(("cuda", 90, 32), 228 * KB, 227 * KB, KB, 64, 32, 65536, 8),
    "sm_100": Machine(("cuda", 100, 32), 228 * KB, 227 * KB, KB, 64, 32, 65536, 8),
    "gfx942": Machine(("hip", "gfx942", 64), 64 * KB, 64 * KB, 0, 32, 32, 512 * 64 * 4, 8),
}
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory


def occupancy(
    arch: str, registers: int, shared: int, warps: int, columns: int = 0
) -> tuple[int, float, str]:
    """(blocks at a time, share of the warps, what limits) of one multiprocessor."""
    machine = MACHINES[arch]
    width = machine.target[2]
    given = -(-max(registers, 1) // machine.granule) * machine.granule
    limits: dict[str, Callable[[], int]] = {
        "warps": lambda: machine.warps // warps,
        "blocks": lambda: machine.blocks,
        "registers": lambda: machine.registers // (given * width * warps),
        "shared": lambda: machine.shared // (shared + machine.reserved) if shared else 1 << 30,
        "tensor memory": lambda: TENSOR_COLUMNS // columns if columns else 1 << 30,
    }
    blocks, limit = min((count(), name) for name, count in limits.items())
    return blocks, round(blocks * warps / machine.warps, 3), limit
