"""rope's Triton kernels against the float64 definition, and the pages that rope_and_write fills against its own."""

import pytest
import torch
from compare import assert_close
from guards import guarded
from launching import DEVICE, DTYPES, check_on_triton, on_triton
from mutations import mutations

from engine.kernels import _backend
from engine.kernels._backend import backend
from engine.kernels.attention_decode import PAGE, page_shapes, read_pages, write_pages
from engine.kernels.rope import rope, rope_and_write, rope_and_write_reference, rope_reference
from engine.kernels.triton import rope as kernels
from engine.kernels.triton._launch import Config

TOKENS = Config({"TOKENS": 4})  # of a program
SHAPES = [(0, 2, 8, 8), (1, 1, 2, 2), (5, 9, 64, 64), (7, 2, 80, 20), (3, 3, 12, 0)]


def angles(positions, rot):
    """(positions, rot): cos, then sin, of p 10000^(-2i/rot)."""
    frequency = 10000.0 ** (-torch.arange(0, rot, 2, dtype=torch.float64) / max(rot, 1))
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def check(tokens, heads, size, rot, dtype):
    table, positions = angles(50, rot).to(DEVICE), torch.randint(0, 50, (tokens,), device=DEVICE)
    x, grad = (torch.randn(tokens, heads, size).to(dtype) for _ in range(2))

    def defined(x):
        return rope_reference(x, positions, table.double() if x.dtype == torch.float64 else table)

    check_on_triton(lambda x: rope(x, positions, table), defined, (x,), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, size, rot", SHAPES)
def test_against_float64(tokens, heads, size, rot, dtype):
    check(tokens, heads, size, rot, dtype)


def pages(num_pages, key_heads, size, dtype):
    return [
        torch.zeros(num_pages, *shape, dtype=dtype) for shape in page_shapes(key_heads, size, dtype)
    ]


def written(op, q, k, v, positions, table, k_pages, v_pages, slots, place):
    """[q rotated, keys, values], rows of the pages, after the op on copies of the pages."""
    k_pages, v_pages = place(k_pages), place(v_pages)
    out = op(q, k, v, positions, table, k_pages, v_pages, slots)
    return [out, *(t.contiguous() for t in read_pages(k_pages, v_pages))]


def check_write(tokens, key_heads, size, rot, dtype, page_dtype):
    """Three query heads a key head. The tolerance is that of the pages' dtype; rows that are not written stay 0."""
    q = torch.randn(tokens, 3 * key_heads, size).to(dtype)
    k, v = (torch.randn(tokens, key_heads, size).to(dtype) for _ in range(2))
    positions, slots = torch.randint(0, 50, (tokens,)), torch.randperm(3 * PAGE)[:tokens]
    cache = pages(3, key_heads, size, page_dtype)
    inputs = [t.to(DEVICE) for t in (q, k, v, positions, angles(50, rot), *cache, slots)]
    with guarded() as guards, backend("triton"):
        placed = [guards.place(t) for t in inputs]
        ours = written(rope_and_write, *placed, place=guards.written)
    plain = written(rope_and_write_reference, *inputs, place=torch.clone)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    truth = written(rope_and_write_reference, *wide_pages(wide), place=torch.clone)
    for name, o, r, t in zip(("q", "keys", "values"), ours, plain, truth, strict=True):
        assert o.dtype == r.dtype
        assert_close(o, r, t, name)
        assert torch.equal(o == 0, r == 0), f"{name}: other places written"
    assert torch.equal(ours[2], plain[2]), "values are copied"


def wide_pages(inputs):
    """The inputs with pages of float64, whose words hold one number."""
    k_pages, v_pages = inputs[5:7]
    num_pages, key_heads, size = len(k_pages), k_pages.shape[1], v_pages.shape[3]
    cache = [t.to(k_pages.device) for t in pages(num_pages, key_heads, size, torch.float64)]
    return [*inputs[:5], *cache, inputs[7]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, size, rot", SHAPES)
def test_write_against_float64(tokens, heads, size, rot, dtype):
    check_write(tokens, heads, size, rot, dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_write_into_pages_of_bfloat16(dtype):
    """A key is rounded to its own dtype, then to that of the pages, as by rope and write_pages: the same to the bit."""
    check_write(19, 3, 64, 64, dtype, torch.bfloat16)


def test_the_launch_is_rope_and_the_write():
    """To the bit, pages and all: the same arithmetic in both kernels."""
    q, k, v = torch.randn(9, 6, 20), torch.randn(9, 2, 20), torch.randn(9, 2, 20)
    positions, slots = torch.randint(0, 50, (9,)), torch.randperm(2 * PAGE)[:9]
    cache = pages(2, 2, 20, torch.bfloat16)
    inputs = [t.to(DEVICE) for t in (q, k, v, positions, angles(50, 16), *cache, slots)]

    def apart(q, k, v, positions, table, k_pages, v_pages, slots):
        write_pages(k_pages, v_pages, slots, rope(k, positions, table), v)
        return rope(q, positions, table)

    with backend("triton"):
        ours, theirs = (written(op, *inputs, place=torch.clone) for op in (rope_and_write, apart))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_gpu_does_not_look_at_before_the_launch():
    """A position outside the table gives NaN; a row whose slot is outside the pages is not written."""
    x, table = torch.randn(4, 1, 4, device=DEVICE), angles(9, 2).to(DEVICE)
    positions = torch.tensor([0, 9, -1, 8], device=DEVICE)
    out = kernels.rope(x, positions, table, False)
    assert out[1:3, :, :2].isnan().all() and torch.equal(out[1:3, :, 2:], x[1:3, :, 2:])
    assert torch.equal(out[0], x[0]) and out[3].isfinite().all()
    k_pages, v_pages = (t.to(DEVICE) for t in pages(1, 1, 4, torch.float32))
    slots = torch.tensor([-1, 3, PAGE, 0], device=DEVICE)
    kernels.rope_and_write(x, x, x, positions.clamp(0, 8), table, k_pages, v_pages, slots)
    keys, values = (t[0, :, 0] for t in read_pages(k_pages, v_pages))
    assert torch.equal(values[[3, 0]], x[[1, 3], 0]) and keys[[3, 0]].ne(0).all()
    others = [i for i in range(PAGE) if i not in (0, 3)]
    assert values[others].eq(0).all() and keys[others].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_independent_and_may_lie_anywhere(dtype):
    """To the bit: in another place of the batch, at another alignment, in programs of another size."""
    table, positions = angles(64, 24).to(DEVICE), torch.randint(0, 64, (11,), device=DEVICE)
    x = torch.randn(11, 3, 30, device=DEVICE).to(dtype)
    whole = kernels.rope(x, positions, table, False, TOKENS)
    with guarded() as guards:
        some, at, angle = (guards.place(t, shift=1) for t in (x[3:8], positions[3:8], table))
        part = kernels.rope(some, at, angle, False, Config({"TOKENS": 2}))
    assert torch.equal(whole[3:8], part)


def test_gradient_is_the_rotation_back():
    table, positions = angles(30, 16).to(DEVICE), torch.randint(0, 30, (6,), device=DEVICE)
    x = torch.randn(6, 2, 20, device=DEVICE)
    turned = on_triton(rope)(x, positions, table)
    torch.testing.assert_close(kernels.rope(turned, positions, table, True), x)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="positions on a GPU are not looked at")
def test_positions_on_the_cpu_are_looked_at():
    with backend("triton"), pytest.raises(ValueError, match="positions.*got .*want 0 ... 8"):
        rope(torch.zeros(2, 1, 4), torch.tensor([0, 9]), angles(9, 4))


OF_ROPE = {
    "sign of sin": ("return a * cos - b * sin, b * cos + a * sin", "return a * cos + b * sin, b * cos - a * sin"),
    "halves swapped": ("return a * cos - b * sin, b * cos + a * sin", "return b * cos + a * sin, a * cos - b * sin"),
    "sin of the next channel": ("table + at + ROT // 2", "table + at + ROT // 2 - 1"),
    "backward turns forward": ("sin = -sin", "sin = sin"),
    "cos for sin": ("_rotate(x, out, tokens, live, cos, sin,", "_rotate(x, out, tokens, live, sin, cos,"),
    "position of the first token": ("positions + tokens", "positions + 0 * tokens"),
    "rest not copied": ("mask=inside), mask=inside)", "mask=inside), mask=inside & (at < 0))"),
    "a token too many": ("if INVERSE:", "live = tokens < N + 1\n    if INVERSE:"),
    "heads behind the last": ("& (head < HEADS)", "& (head < HEAD_BLOCK)"),
    "channels behind the last": ("& (channel < last)", "& (channel < BLOCK)"),
}  # fmt: skip
OF_THE_WRITE = {
    "page of the first row": ("slot // PAGE * HEADS + head) * (D", "slot % PAGE * 0 * HEADS + head) * (D"),
    "keys in the layout of values": ("channel // W) * PAGE + slot % PAGE", "channel // W) * PAGE + slot % PAGE // W"),
    "words of keys in the wrong order": ("word * W + channel % W", "word * W + (channel + 1) % W"),
    "words of values in the wrong order": ("word * W + slot % W", "word * W + (slot + 1) % W"),
    "values by channel words": ("slot % PAGE // W) * D + channel", "slot % PAGE // W) * D + channel // W"),
    "heads of values": ("slot // PAGE * HEADS + head) * (PAGE", "slot // PAGE * HEADS + 0 * head) * (PAGE"),
    "second half of keys over the first": ("i += ROT // 2", "i += 0"),
    "rest of keys not rounded to its place": ("i = ROT + tl.arange(0, REST)", "i = tl.arange(0, REST)"),
    "keys not rotated": ("_turned(k, at, inside, cos, sin, ROT)", "_turned(k, at, inside, 1.0, 0.0, ROT)"),
    "values of keys": ("tl.load(v + at", "tl.load(k + at"),
    "rows without a slot": ("placed = (slot >= 0) & (slot < num_slots)", "placed = slot < num_slots"),
    "queries of half of the heads": ("HEAD_BLOCK, HALF, REST)\n    slot", "HEAD_BLOCK // 2, HALF, REST)\n    slot"),
}  # fmt: skip


def small_programs(check, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend.triton_kernels("rope"), "config", lambda op, size, device: TOKENS)
        check(*arguments)


def test_programs_of_several_tokens():
    small_programs(check, 6, 3, 20, 12, torch.float32)
    small_programs(check_write, 18, 3, 20, 12, torch.float32, torch.bfloat16)


@mutations(kernels, OF_ROPE)
def test_defects_are_caught():
    small_programs(check, 6, 3, 20, 12, torch.float32)


@mutations(kernels, OF_THE_WRITE)
def test_defects_of_the_write_are_caught():
    small_programs(check_write, 18, 3, 20, 12, torch.float32, torch.bfloat16)
