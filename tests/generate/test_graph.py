"""The GPU's decode step, called without capture in Triton's interpreter, against the network's definition layer by
layer: the same uniform numbers give the same tokens, log-probs and entropies by float32's rounding.

With a GPU the captured step is also held against the same step launched kernel by kernel, to the bit.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_engines import SIZES, save_tiny

from engine.generate import graph
from engine.generate.cache import page_bytes
from engine.generate.generator import generate
from engine.generate.graph import Decoder, GraphSteps, bucket_of, decoder_for, release
from engine.generate.sampling import Sampling
from engine.generate.scheduler import Limits
from engine.generate.steps import DefinedSteps, Rows
from engine.kernels._backend import backend
from engine.kernels.attention_decode import PAGE
from engine.model.weights import load_policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="graphs need a GPU")
ONE_LAYER = {
    "llama": {
        "hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    },
    "gpt2": {"n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 96},
    "gpt_neox": {
        "hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1,
        "num_attention_heads": 2, "rotary_pct": 0.4,
    },
    "qwen2": {**SIZES["qwen2"], "num_hidden_layers": 1},
    "qwen3": {**SIZES["qwen3"], "num_hidden_layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One layer of each family (two of llama, so that a layer's keys can be taken for another's)."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        for family, sizes in ONE_LAYER.items():
            patch.setitem(SIZES, family, sizes)
        return {family: save_tiny(family, root / family) for family in ONE_LAYER}


def load(folder, dtype="float32", trainable=False):
    with backend("triton"):
        return load_policy(folder, dtype, trainable, device=DEVICE)


def rows_of(model, count, longest, seed=0) -> tuple[Rows, torch.Tensor, int]:
    """Running sequences at several positions, pages in no order."""
    draws = random.Random(seed)
    positions = [draws.randrange(longest) for _ in range(count)]
    width = -(-longest // PAGE)
    pages = list(range(count * width))
    draws.shuffle(pages)
    table = torch.tensor(pages, dtype=torch.int32).view(count, width)
    tokens = torch.tensor([draws.randrange(250) for _ in range(count)])
    uniform = torch.tensor([draws.random() for _ in range(count)], dtype=torch.float64)
    return Rows(tokens, torch.tensor(positions), table), uniform, len(pages)


@torch.no_grad()
def both(model, count, settings, longest=40, kind=GraphSteps):
    """(draws of the step, draws of the definition) over the same pages, which hold random keys and values."""
    rows, uniform, num_pages = rows_of(model, count, longest)
    with backend("triton"):
        ours = kind(model, num_pages, settings, longest)
    theirs_cache = ours.cache.__class__(
        model.architecture.num_layers, num_pages, model.architecture.num_kv_heads,
        model.architecture.head_dim, model.kv_dtype, model.device,
    )  # fmt: skip
    for mine, other in zip(pages_of(ours.cache), pages_of(theirs_cache), strict=True):
        other.copy_(torch.randn_like(other))
        mine[:num_pages].copy_(other)
    with backend("triton"):
        ours.decode(Rows(rows.tokens, rows.positions, rows.page_table.roll(1, 0)), uniform)
        for mine, other in zip(pages_of(ours.cache), pages_of(theirs_cache), strict=True):
            mine[:num_pages].copy_(other)
        got = ours.decode(rows, uniform)  # on another table than the step before
    with backend("reference"):
        want = DefinedSteps(model, theirs_cache, settings).decode(rows, uniform)
    for mine, other in zip(pages_of(ours.cache), pages_of(theirs_cache), strict=True):
        torch.testing.assert_close(mine[:num_pages], other, rtol=1e-5, atol=1e-5)
    return got, want


def pages_of(cache):
    return (*cache.keys, *cache.values)


def close(got, want):
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.tokens.device.type == "cpu" and got.tokens.dtype == torch.int64
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.entropies, want.entropies, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ONE_LAYER)
def test_a_step_is_the_definitions(folders, family):
    """Three rows and a dead one; every page but those written to stays as it is."""
    close(*both(load(folders[family]), 3, Sampling(1, 0.8)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_bucket_and_filters(folders, count):
    close(*both(load(folders["llama"]), count, Sampling(1, 0.8, top_k=20)))


def test_buckets():
    sizes = [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65, 256)]
    assert sizes == [1, 2, 4, 4, 8, 8, 16, 64, 128, 256]


def test_sequences_that_stop_wait_and_take_used_pages(folders):
    """Rows come and go, buckets change, pages are used again: as the definition draws them."""
    draws = random.Random(1)
    prompts = [[draws.randrange(250) for _ in range(n)] for n in (1, 16, 17)]
    model, stops = load(folders["llama"]), frozenset(range(3, 250, 5))
    page = page_bytes(2, 2, 8, model.kv_dtype)
    limits = Limits(max_active=3, kv_cache_gb=5.5 * page * 1e-9)
    results = []
    for name in ("triton", "reference"):
        with backend(name):
            results.append(generate(model, prompts, Sampling(5), stops, n=2, seed=3, limits=limits))
    assert len({len(g.tokens) for g in results[1]}) > 1
    for got, want in zip(*results, strict=True):
        assert got.tokens == want.tokens and got.finish_reason == want.finish_reason
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-4)


def test_a_refresh_is_seen_and_what_is_captured_is_kept(folders):
    """The compute copy is rewritten in place, so a decoder serves the next call."""
    model = load(folders["llama"], "bfloat16", trainable=True)

    def run():
        with backend("triton"):
            return generate(model, [[5, 6, 7]], Sampling(3), frozenset(), seed=2)[0]

    before = run()
    decoder = decoder_for(model, 1, 3)
    assert run().tokens == before.tokens and decoder_for(model, 1, 3) is decoder
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter.mul_(-1.5)
    model.refresh()
    after = run()
    assert decoder_for(model, 1, 3) is decoder
    assert not torch.equal(after.logprobs, before.logprobs)
    fresh = Decoder(model, 1, 256)
    kept, graph._decoders[model.weights] = graph._decoders[model.weights], fresh
    assert run().tokens == after.tokens and kept is decoder


def test_a_decoder_belongs_to_one_call_and_to_its_weights(folders):
    model = load(folders["llama"])
    with backend("triton"):
        running = GraphSteps(model, 4, Sampling(1), 40)
        other = GraphSteps(model, 4, Sampling(1), 40)
        assert other.cache is not running.cache, (
            "two calls at once would write into each other's pages"
        )
        del other
        again = GraphSteps(model, 2, Sampling(1), 30)
        larger = decoder_for(model, 9, 40)
        assert larger.cache is not again.cache and larger.cache.keys[0].shape[0] == 10
    release(model)
    assert model.weights not in graph._decoders
    decoder_for(model, 1, 1)
    weights = weakref.ref(model.weights)
    del model, running, again
    gc.collect()
    assert weights() is None, "weights that nobody has are kept alive by their decoder"


def test_dead_rows_stay_on_the_last_page(folders):
    model = load(folders["llama"])
    rows, uniform, num_pages = rows_of(model, 5, 40)
    with backend("triton"), torch.no_grad():
        steps = GraphSteps(model, num_pages, Sampling(1), 40)
        steps.decode(rows, uniform)
        written = {
            p
            for keys in steps.cache.keys
            for p in keys.flatten(1).any(1).nonzero().flatten().tolist()
        }
        own = {int(rows.page_table[r, p // PAGE]) for r, p in enumerate(rows.positions.tolist())}
        assert written == own | {num_pages}
        alone = Rows(rows.tokens[:1], rows.positions[:1], rows.page_table[:1])
        first = steps.decode(rows, uniform)
        assert torch.equal(steps.decode(alone, uniform[:1]).tokens, first.tokens[:1])


def mutated(old: str, new: str) -> ModuleType:
    """engine/generate/graph.py with one place changed."""
    source = Path(graph.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times, want once"
    module = ModuleType("mutated_graph")
    exec(compile(source.replace(old, new), graph.__file__, "exec"), module.__dict__)
    return module


DEFECTS = {
    "the own key is not seen": ("(positions + 1).int())", "positions.clamp(min=1).int())"),
    "another layer's keys": ("self.cache.keys[i], self", "self.cache.keys[0], self"),
    "the norm of the layer before": ("x, norms[i + 1])", "x, norms[i])"),
    "the sum is not kept": (
        "y, x = self._norm_of_sum(mixed, x",
        "y, _ = self._norm_of_sum(mixed, x",
    ),
    "the table of the step before": (
        "is not self._loaded:",
        "is not None and self._loaded is None:",
    ),
    "dead rows on a page in use": ("width, self.num_pages,", "width, 0,"),
    "a forgotten temperature": (
        "bits.view(torch.float64), temperature)",
        "bits.view(torch.float64))",
    ),
    "random numbers cut off": ("uniform.view(torch.int64)", "uniform.long()"),
    "k and v exchanged": ("rope_and_write(q, k, v,", "rope_and_write(q, v, k,"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_caught(folders, defect):
    changed = mutated(*DEFECTS[defect])
    with pytest.raises(AssertionError):
        close(*both(load(folders["llama"]), 3, Sampling(1, 0.8), kind=changed.GraphSteps))


@GPU
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_replay_is_the_step_to_the_bit(folders, dtype):
    model = load(folders["llama"], dtype)
    prompts = [[5, 6, 7], [9] * 17, [3]]
    captured = generate(model, prompts, Sampling(20), frozenset({7}), n=3, seed=1)
    again = generate(model, prompts, Sampling(20), frozenset({7}), n=3, seed=1)
    with graph.captured(False):
        plain = generate(model, prompts, Sampling(20), frozenset({7}), n=3, seed=1)
    for one, two, three in zip(captured, again, plain, strict=True):
        assert one.tokens == two.tokens == three.tokens
        assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.logprobs, three.logprobs)
