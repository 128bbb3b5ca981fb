"""Offsets behind 2^31 elements: every kernel on tensors that have them, and each widening to 64 bits dropped in turn.

An op whose tensors hold a number or a few a token cannot have such: offsets of packed sequences are int32.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from far import far, last_programs, needs_room
from mutations import mutate, running

from engine.kernels import _backend
from engine.kernels.attention_decode import PAGE, page_shapes

pytestmark = [needs_room, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

FILES = Path(__file__).parents[2] / "kernels" / "triton"
SMALL = torch.float32
N = 2**31 + 5  # elements of a flat tensor


def swiglu(kernels: Any) -> None:
    gate, up = far(N), far(N)
    gate[-5:], up[-5:] = torch.arange(5) - 2, 3
    want = torch.nn.functional.silu(gate[-5:].float()) * 3
    torch.testing.assert_close(kernels.swiglu(gate, up)[-5:].float(), want, rtol=1e-2, atol=1e-2)
    d_gate, d_up = kernels.swiglu_backward(gate, gate, up)
    assert d_gate[-1] != 0 and d_up[-1] != 0


def gelu(kernels: Any) -> None:
    x = far(N)
    x[-5:] = torch.arange(5) - 2
    want = torch.nn.functional.gelu(x[-5:].float())
    torch.testing.assert_close(kernels.gelu(x, False)[-5:].float(), want, rtol=1e-2, atol=1e-2)
    assert kernels.gelu_backward(x, x, True)[-1] != 0


def adamw(kernels: Any) -> None:
    master, grad, exp_avg, exp_avg_sq, ema = (far(N, dtype=SMALL) for _ in range(5))
    copy, master[-1], grad[-1] = far(N), 2.0, 1.0
    numbers = (0.5, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0, 1.0)
    kernels.adamw_step(master, grad, exp_avg, exp_avg_sq, copy, ema, *numbers, None, 0.0)
    assert master[-1] != 2.0 and copy[-1] == master[-1].bfloat16()
    assert ema[-1] == master[-1] and exp_avg[-1] == pytest.approx(0.1)
    assert kernels.square_sums(grad)[-1] == 1.0


def rope(kernels: Any) -> None:
    tokens, heads, D = 2**19 + 5, 32, 128
    x, positions = far(tokens, heads, D), torch.zeros(tokens, dtype=torch.int64)
    table = torch.cat([torch.zeros(2, D // 2), torch.ones(2, D // 2)], 1)  # a quarter turn
    x[-1], x[-1, :, D // 2 :] = 2.0, 3.0
    assert kernels.rope(x, positions, table, False)[-1, -1].tolist() == [-3.0] * 64 + [2.0] * 64
    k, v = (torch.zeros(tokens, 1, D, dtype=torch.bfloat16) for _ in range(2))
    v[-64:] = 1.0
    pages = [torch.zeros(1, *shape, dtype=torch.bfloat16) for shape in page_shapes(1, D, k.dtype)]
    kernels.rope_and_write(x, k, v, positions, table, *pages, positions)
    assert pages[1].float().sum() == D


def norms(kernels: Any, name: str) -> None:
    """Rows that fit a program, and rows that do not; a part's last rows are few."""
    forward, backward = (getattr(kernels, f"{name}{of}") for of in ("", "_backward"))
    for rows, H in ((255 * 1040 - 1000, 8192), (255 * 520 + 3, 16384)):
        x, weight = far(rows, H, dtype=SMALL), torch.ones(H)
        x[-1] = torch.arange(H) % 2 * 2.0 - 1.0
        given = (x, weight) if name == "rmsnorm" else (x, weight, None)
        out, *statistics = forward(*given, 1e-5, torch.bfloat16)
        torch.testing.assert_close(out[-1].float(), x[-1], rtol=1e-2, atol=1e-2)
        assert statistics[-1][-1] == pytest.approx(1.0, rel=1e-4)
        d_x = backward(x, x, weight, *statistics)[0]
        torch.testing.assert_close(d_x[-1], torch.zeros(H), rtol=0, atol=1e-4)
        del x, out, d_x


def rmsnorm(kernels: Any) -> None:
    norms(kernels, "rmsnorm")


def layernorm(kernels: Any) -> None:
    norms(kernels, "layernorm")


def attention(kernels: Any) -> None:
    """The last segment's tile is not empty, whichever of the blocks."""
    tokens, heads, D = 2**18 + 104, 32, 256
    q, k, v, grad = (far(tokens, heads, D) for _ in range(4))
    cu = torch.cat([torch.arange(0, tokens - 39, 64), torch.tensor([tokens])]).int()
    k[-40:], v[-40:], q[-40:], grad[-40:] = 0.0, 2.0, 1.0, 1.0
    out, lse = kernels.attention(q, k, v, cu, None)
    assert (out[-1, 0] == 2.0).all() and lse[-1, 0] == pytest.approx(3.689, abs=1e-3)  # log 40
    lse.fill_(torch.tensor(40.0).log())  # of the heads whose programs did not run
    _, _, d_v = kernels.attention_backward(grad, q, k, v, out, lse, cu, None)
    assert d_v[-1, -1, 0].item() == pytest.approx(1 / 40, rel=1e-2)


def attention_decode(kernels: Any) -> None:
    rows, heads, key_heads, D, width = 129, 32, 8, 128, 65536
    pages = 2**18 + 3
    k_shape, v_shape = page_shapes(key_heads, D, torch.bfloat16)
    k_pages, v_pages = far(pages, *k_shape), far(pages, *v_shape)
    q = torch.zeros(rows, heads, D, dtype=torch.bfloat16)
    table = torch.full((rows, width), pages - 1, dtype=torch.int32)
    v_pages[-1] = 2.0
    lengths = torch.ones(rows, dtype=torch.int32)
    lengths[-1] = width * PAGE
    assert rows * heads * (width * PAGE // 256) * D > 2**31  # of the chunks' results
    kernels.attention_decode(q, k_pages, v_pages, table, lengths)


def linear(kernels: Any) -> None:
    for m, n, k in ((2**25 + 5, 16, 64), (3, 2**25 + 5, 64), (2**16 + 3, 2**15 + 8, 16)):
        x, weight = (
            far(rows, k) if rows * k > 2**31 else torch.zeros(rows, k, dtype=torch.bfloat16)
            for rows in (m, n)
        )
        x[-3:], weight[-3:] = torch.arange(k) % 3, torch.arange(k) % 2
        y = kernels.exact_product(x, weight, None, torch.bfloat16)
        want = x[-3:].float() @ weight[-3:].float().T
        assert torch.equal(y[-3:, -3:].float(), want.bfloat16().float()), (m, n, k)


def linear_logprob(kernels: Any) -> None:
    V, H = 2**18 + 3, 8192
    weight, hidden = far(V, H), torch.ones(2, H, dtype=torch.bfloat16)
    weight[-1] = 1 / H
    given = (hidden, weight, weight[:0], torch.full((2,), V - 1), 1.0, torch.zeros(V))
    kernels.linear_logprob(*given, None)  # the backward makes its tiles by the same function


CHECKS: dict[str, Callable[[Any], None]] = {
    check.__name__: check
    for check in (
        adamw, attention, attention_decode, gelu, layernorm, linear, linear_logprob, rmsnorm, rope, swiglu,
    )
}  # fmt: skip

REVERSED = ("attention",)  # whose first program has the last rows

A_TOKEN = "a few numbers a token, whose count is an int32"
OF_ROWS = (
    "of 4 ROWS at most, of ROWS where hidden states are wide: 2^31 statistics are of a vocabulary of millions, hidden"
    " states 500,000 wide"
)
HEADS = "a number a row and head: 2^31 of them have queries of 256 GB and more"
# (file, line of the kernel) -> why its offsets stay below 2^31 all the same
SHORT: dict[str, str] = {
    "_reduce": A_TOKEN,
    "gae": A_TOKEN,
    "kl_reward": A_TOKEN,
    "kl_reward_gae": A_TOKEN,
    "ppo_policy_loss": A_TOKEN,
    "ppo_value_loss": A_TOKEN,
    "ranking_loss": A_TOKEN,
    "whiten": A_TOKEN,
    "_row_sums": "256 partial sums of a vector at most",
    "linear_sample": OF_ROWS,
    "linear_logprob: row0 = tl.program_id(0).to(tl.int64) * BLOCK_M": OF_ROWS,
    "linear_logprob: out = statistics + tl.cast(piece, tl.int64) * N + row": OF_ROWS,
    "linear_logprob: out = statistics + 2 * tl.cast(piece, tl.int64) * N + row": OF_ROWS,
    "linear_logprob: plane = 2 * tl.cast(pieces, tl.int64) * N": OF_ROWS,
    "linear_logprob: plane = tl.cast(pieces, tl.int64) * N": OF_ROWS,
    "linear_logprob: row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)": OF_ROWS,
    "linear_logprob: plane = tl.cast(N, tl.int64) * TILES": OF_ROWS,
    "linear_logprob: at = statistics + t[:, None].to(tl.int64) * N + row[None, :]": OF_ROWS,
    "linear_logprob: block = tl.program_id(0).to(tl.int64)": OF_ROWS,
    "attention: lse_at = (begin + rows).to(tl.int64) * HEADS + head": HEADS,
    "attention: lse_at = token.to(tl.int64) * HEADS + head": HEADS,
    "attention_decode: pages = table + row.to(tl.int64) * width": "a table of 8 GB",
}
WIDE = re.compile(r"\.to\(tl\.int64\)|tl\.cast\((\w+), tl\.int64\)")


def widenings() -> list[tuple[str, int, str]]:
    """(file, which of its widenings, its line) of those that must matter."""
    found = []
    for path in sorted(FILES.glob("*.py")):
        source = path.read_text()
        for number, match in enumerate(WIDE.finditer(source)):
            line = source[: match.start()].count("\n")
            text = source.splitlines()[line].strip()
            if path.stem not in SHORT and f"{path.stem}: {text}" not in SHORT:
                found.append((path.stem, number, text))
    return found


@pytest.mark.parametrize("op", CHECKS)
def test_offsets_behind_the_largest_int32(op):
    with last_programs(first=op in REVERSED):
        CHECKS[op](_backend.triton_kernels(op))


@pytest.mark.parametrize("op, number, line", widenings())
def test_a_widening_that_is_dropped_is_caught(op, number, line, tmp_path):
    kernels = _backend.triton_kernels(op)
    source = Path(str(kernels.__file__)).read_text()
    match = [*WIDE.finditer(source)][number]
    before, narrow = source[: match.end()], match[1] or ""
    changed = mutate(kernels, before, source[: match.start()] + narrow, tmp_path)
    caught = pytest.raises(AssertionError, match="overflow|address")
    with caught, running(changed), last_programs(first=op in REVERSED):
        CHECKS[op](changed)


def test_every_reason_is_of_a_line_that_is_there():
    for name in SHORT:
        stem, _, line = name.partition(": ")
        source = (FILES / f"{stem}.py").read_text()
        assert WIDE.search(source) and line in source, name
