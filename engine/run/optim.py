"""Adam over named fp32 master weights, with one global clip and a guard against bad gradients.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        (t = number of this step, from 1)
    torch: w <- w (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    tf:    w <- w (1 - lr decay) - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

The tf form is the torch form with eps / sqrt(1 - b2^t) in place of eps: a larger eps early on,
hence smaller first steps (the predecessors of InstructGPT trained with it and eps 1e-5).
Betas (0.9, 0.95): InstructGPT appendix C. Eps, decay and clipping are not in the paper.

torch's fused AdamW does the arithmetic; the default one is several times slower on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import CheckpointError, ConfigError

# A block is short enough that torch never splits its sum between threads (it does from 32,768
# elements on), so that the norm has the same bits for any number of threads.
NORM_BLOCK = 4096
# Tables of vectors, one row a token or a position. They have two dimensions like a matrix, but a
# row is touched only when its token occurs: decay would pull the rare ones to zero.
EMBEDDING_NAMES = frozenset({"embed_tokens", "embed_positions"})  # of engine.model.names


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's constants. `weight_decay` touches matrices only: no biases, norms or embeddings."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_style: Literal["torch", "tf"] = "torch"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer: got betas {self.betas}, want two numbers in [0, 1)")
        if not self.eps > 0:
            raise ConfigError(f"optimizer: got eps {self.eps}, want a number > 0")
        if self.eps_style not in ("torch", "tf"):
            raise ConfigError(f"optimizer: got eps_style {self.eps_style!r}, want 'torch' or 'tf'")
        if not self.weight_decay >= 0:
            raise ConfigError(
                f"optimizer: got weight_decay {self.weight_decay}, want a number >= 0"
            )


@dataclass(frozen=True)
class StepResult:
    """`grad_norm` before clipping; `skipped` says that it was not finite and no weight moved."""

    grad_norm: float
    skipped: bool


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: a matrix, and not a table of embeddings."""
    return parameter.dim() >= 2 and EMBEDDING_NAMES.isdisjoint(name.split("."))


def global_norm(tensors: Iterable[Tensor]) -> float:
    """sqrt(sum of squares) over all elements of all tensors.

    fp32 within fixed blocks, float64 between them; the same bits for any number of threads.
    """
    total = 0.0
    elsewhere = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() // NORM_BLOCK * NORM_BLOCK
        norms = [torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)]
        norms.append(torch.linalg.vector_norm(flat[whole:]).reshape(1))
        squares = torch.cat(norms).double().square_()
        if squares.device.type == "cpu":
            total += math.fsum(squares.tolist())
        else:  # read once, not once a tensor
            elsewhere.append(squares.sum())
    if elsewhere:
        total += float(torch.stack(elsewhere).sum())
    return math.sqrt(total)


class Optimizer:
    """One Adam over named parameters; the learning rate is given at each step.

    `parameters` must be float32 and every one of them must have a gradient at `step`.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], config: OptimizerConfig | None = None
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config or OptimizerConfig()
        self.steps = 0
        self.skipped = 0
        if not self.parameters:
            raise ConfigError(
                "optimizer: got no parameters, want at least one; is the model frozen?"
            )
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ConfigError(
                    f"optimizer: {name} is {parameter.dtype}, want float32 masters: an update of "
                    "1e-6 of a weight is lost in anything shorter"
                )
        decayed = [p for name, p in self.parameters.items() if decays(name, p)]
        others = [p for name, p in self.parameters.items() if not decays(name, p)]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=self.config.betas, fused=True
        )
        for parameter in self.parameters.values():
            # What torch makes at its first step, made now: the state is complete from the start.
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adam.zero_grad(set_to_none=True)

    def grad_norm(self) -> float:
        """The global norm of the gradients gathered so far; one that is missing counts as 0."""
        return global_norm(p.grad for p in self.parameters.values() if p.grad is not None)

    def step(self, lr: float, max_grad_norm: float | None = None) -> StepResult:
        """Clip the gradients to a global norm of `max_grad_norm` (None: do not), then step.

        A norm that is not finite moves nothing, neither weights nor moments nor the step count: the
        result says so and `skipped` counts it. Raises `RuntimeError` when a parameter has no
        gradient, which is a mistake of the caller's loss.
        """
        without = [name for name, p in self.parameters.items() if p.grad is None]
        if without:
            raise RuntimeError(
                f"optimizer: {len(without)} of {len(self.parameters)} parameters have no gradient "
                f"({', '.join(without[:5])}, ...); want a backward pass that reaches all of them"
            )
        norm = self.grad_norm()
        if not math.isfinite(norm):
            self.skipped += 1
            return StepResult(norm, skipped=True)
        if max_grad_norm is not None and norm > max_grad_norm:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(max_grad_norm / norm)
        eps = self.config.eps
        if self.config.eps_style == "tf":
            eps /= math.sqrt(1 - self.config.betas[1] ** (self.steps + 1))
        for group in self._adam.param_groups:
            group["lr"], group["eps"] = lr, eps
        self._adam.step()
        self.steps += 1
        return StepResult(norm, skipped=False)

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, plus the count of skipped steps. Not copies."""
        tensors = {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "skipped": torch.tensor(self.skipped, dtype=torch.int64),
        }
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self._adam.state[parameter][moment]
        return tensors

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave. Raises `CheckpointError` when names or shapes differ."""
        own = self.state()
        if state.keys() != own.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise CheckpointError(
                f"optimizer: the checkpoint lacks {missing[:5]} and has {extra[:5]} too many; "
                "want the checkpoint of a run of the same model"
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
                raise CheckpointError(
                    f"optimizer: {name} is {tuple(state[name].shape)} {state[name].dtype} in the "
                    f"checkpoint, want {tuple(tensor.shape)} {tensor.dtype}"
                )
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        for name, parameter in self.parameters.items():
            moments = self._adam.state[parameter]
            moments["step"].fill_(self.steps)
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[moment].copy_(state[f"{moment}.{name}"])
