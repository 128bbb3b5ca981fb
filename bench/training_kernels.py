"""The ops of training alone: `linear_logprob` against what torch can do, the others against one pass over their bytes.

    python -m bench.training_kernels NAME --threads 2     the memory that NAME's linear_logprob takes, as JSON

Extra memory is what a call takes above its inputs and gradients: the process's peak while it runs, in a process of its
own. It is told as a part of what the whole float32 logits would take.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import machine
from bench.decode import resident_bytes
from bench.training_peer import peak_memory_gb
from bench.workloads import spread
from engine import ops
from engine.kernels.linear import pack_weight

Row = dict[str, Any]
ROWS, VOCABULARY, HIDDEN = 2048, 49152, 576  # SmolLM2-135M's head
CHUNK = 256  # rows of the chunked rival's logits at once: 50 MB of them
EPISODES, LENGTH, ANSWERS = 512, 1024, 9  # answers of a prompt: the paper's most
# Of a small op in one round: the best counts, since what disturbs a call only adds to it. Beside a process that keeps a
# core busy, the best of twenty calls of two threads was ten times the undisturbed one.
CALLS = 200
OURS, LATER = "engine", "engine, slopes later"
Gradients = tuple[Tensor, Tensor]  # of hidden (N, H) and of the weight (V, H)


def head_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # (N,)
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Gradients:
    """A part of the rows at a time, forward and backward: no more than its logits exist at once."""
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
    for part in torch.arange(hidden.shape[0]).split(CHUNK):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        x, y = hidden[rows].detach(), targets[rows, None]
        p = F.linear(x, weight).float().softmax(-1).mul_(-grad[rows, None])
        p.scatter_add_(1, y, grad[rows, None])
        slope = p.to(x.dtype)  # d loss / d logits
        hidden_grad[rows] = slope @ weight
        weight_grad.addmm_(slope.T, x)
    return hidden_grad, weight_grad


def head_gradients(name: str, dtype: torch.dtype, rows: int = ROWS) -> Callable[[], Gradients]:
    """A call of one implementation, forward and backward, on the same numbers; a rival has them in `dtype`.

    The engine's is the call that SFT and PPO make, of a loss whose slopes follow from the rows (linear_logprob_loss);
    LATER is linear_logprob, which is given the slopes in its backward.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    grad = torch.randn(rows, generator=generator)
    if name in (OURS, LATER):
        master = weight.requires_grad_()
        packed = pack_weight(master.detach(), torch.bfloat16)
        activations = torch.bfloat16 if ops.cpu_class() == "amx" else torch.float32
        x = hidden.to(activations).requires_grad_()

        def weighted(logprob: Tensor, _entropy: Tensor, part: slice) -> Tensor:
            return logprob @ grad[part]

        def engine_run() -> Gradients:
            loss, *_ = ops.linear_logprob_loss(x, packed, targets, weighted, master=master)
            return torch.autograd.grad(loss, (x, master))  # type: ignore[return-value]

        def later_run() -> Gradients:
            logprob, _ = ops.linear_logprob(x, packed, targets, master=master)
            return torch.autograd.grad(logprob, (x, master), grad)  # type: ignore[return-value]

        return engine_run if name == OURS else later_run
    x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    if name == "chunked":
        return lambda: chunked(x.detach(), w.detach(), targets, grad)
    logprob_of = torch.compile(head_of, dynamic=False) if name == "compiled" else head_of

    def torch_run() -> Gradients:
        return torch.autograd.grad(logprob_of(x, w, targets), (x, w), grad)  # type: ignore[return-value]

    return torch_run


RIVALS = ("eager", "chunked", "compiled")


def reset_peak() -> None:
    """The kernel's peak of this process begins anew. Raises OSError where the kernel has no such thing."""
    Path("/proc/self/clear_refs").write_text("5")


def release_freed() -> None:
    """Freed memory that glibc keeps goes back: a call that takes it again would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's alone
        trim(0)


def extra_memory(run: Callable[[], Gradients]) -> float:
    """Bytes above inputs and gradients at the worst moment of a call."""
    release_freed()
    before = resident_bytes()
    reset_peak()
    gradients = run()
    return peak_memory_gb() * 1e9 - before - sum(g.nbytes for g in gradients)


def memory_of(name: str, threads: int, dtype: str) -> float:
    """The same, in a process of its own that has run nothing else."""
    command = [sys.executable, "-m", "bench.training_kernels", name, "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--dtype", dtype],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    return float(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])


def seconds_of(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def nearly(ours: Gradients, theirs: Gradients, name: str) -> None:
    """Raises RuntimeError where gradients differ by more than bfloat16 operands explain."""
    for what, own, other in zip(("hidden", "weight"), ours, theirs, strict=True):
        apart = float((own.float() - other.float()).norm() / other.float().norm())
        if not apart < 2e-2:
            raise RuntimeError(
                f"linear_logprob: gradients of {what} are {apart:.3g} of {name}'s apart"
            )


def linear_logprob(repeats: int, threads: int, rival_dtype: str) -> Row:
    """Forward and backward of all implementations in turns; the ratio is to the strongest of torch's."""
    runs = {n: head_gradients(n, getattr(torch, rival_dtype)) for n in (OURS, LATER, *RIVALS)}
    own = runs[OURS]()
    for name in (LATER, *RIVALS):  # to warm up, and to compile
        nearly(own, runs[name](), name)
    del own
    rounds = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(repeats)]
    median = {name: statistics.median(r[name] for r in rounds) for name in runs}
    best = min(RIVALS, key=lambda name: median[name])
    memory = {name: memory_of(name, threads, rival_dtype) for name in (OURS, best)}
    return {
        "workload": "linear_logprob",
        "sequences": ROWS,
        "peer": "torch",
        "peer_dtype": rival_dtype,
        "peer_versions": {"torch": torch.__version__},
        "strongest": best,
        **spread([r[best] / r[OURS] for r in rounds]),
        "memory_ratio": memory[OURS] / memory[best],
        "memory_of_logits": memory[OURS] / (4 * ROWS * VOCABULARY),
        "seconds": median[OURS],
        "peer_seconds": median[best],
        "all_seconds": median,
        "tokens": ROWS,
        "repeats": repeats,
    }


def op_calls(episodes: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """A forward call of each op on episodes of 1024 tokens, and the bytes that it must read and write.

    ranking_loss has as many scores as the others have tokens (but for a part of a prompt), nine to a prompt, best rank
    first as load_rankings gives them, or in any order; its forward writes the gradient too, which training always asks
    for.
    """
    count = episodes * LENGTH
    scores = count // ANSWERS * ANSWERS
    x, y, score = torch.randn(count), torch.randn(count), torch.randn(episodes)
    near = x + 0.1 * torch.randn(count)
    cu = torch.arange(0, count + 1, LENGTH, dtype=torch.int32)
    groups = torch.arange(0, scores + 1, ANSWERS, dtype=torch.int32)
    ranked = x[:scores]
    prompts = count // ANSWERS
    best_first = torch.arange(ANSWERS).float().repeat(prompts)
    any_order = torch.rand(prompts, ANSWERS).argsort(1).float().flatten()
    ranking_bytes = 2 * ranked.nbytes + best_first.nbytes + groups.nbytes
    return {
        "gae": (lambda: ops.gae(x, y, cu), 4 * x.nbytes),
        "kl_reward": (lambda: ops.kl_reward(x, near, score, cu, 0.02), 4 * x.nbytes),
        "whiten": (lambda: (ops.whiten(x),), 2 * x.nbytes),
        "ranking_loss": (lambda: ops.ranking_loss(ranked, best_first, groups), ranking_bytes),
        "ranking_loss-any-order": (lambda: ops.ranking_loss(ranked, any_order, groups), ranking_bytes),
    }


def check_op(name: str) -> None:
    """Against the torch definition, on a few episodes. Raises AssertionError where they differ."""
    run, _ = op_calls(2)[name]
    found = run()
    with ops.backend("reference"):
        want = run()
    for own, other in zip(found, want, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-3, msg=lambda m: f"{name}: {m}")


def passes(names: tuple[str, ...], repeats: int, limits: Row) -> Iterator[Row]:
    """Rows of the small ops. Here `ratio` is how many times one pass over the bytes a call takes, at the rate at which
    memory is copied; `ratio_in_cache` is to the rate of a copy of that size, which may lie in a cache.
    """
    for name, (run, size) in op_calls(EPISODES).items():
        if name not in names:
            continue
        check_op(name)
        floor = size / machine.memory_copy_rate(limits)
        best = [min(seconds_of(run) for _ in range(CALLS)) for _ in range(repeats)]
        yield {
            "workload": name,
            "sequences": EPISODES,
            "answers": ANSWERS if name.startswith("ranking_loss") else None,
            "peer": "one pass over its bytes",
            **spread([seconds / floor for seconds in best]),
            "ratio_in_cache": statistics.median(best) * machine.copy_rate(limits, size) / size,
            "memory_ratio": None,
            "seconds": statistics.median(best),
            "peer_seconds": floor,
            "tokens": EPISODES * LENGTH,
            "repeats": repeats,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=(OURS, LATER, *RIVALS))
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--dtype", default="float32", help="a rival's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    head_gradients(args.name, dtype, rows=16)()  # what is made once and kept is no part of a call
    run = head_gradients(args.name, dtype)
    if args.name == "compiled":
        run()  # nor is the compiler, which runs again for another shape
    print(json.dumps({"extra_bytes": math.floor(extra_memory(run))}))


if __name__ == "__main__":
    main()
