"""Adam over named fp32 master weights, with one global clip and a guard against bad gradients.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        (t = number of this step, from 1)
    torch: w <- w (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
    tf:    w <- w (1 - lr decay) - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

The tf form is the torch form with eps / sqrt(1 - b2^t) in place of eps: a larger eps early on,
hence smaller first steps (the predecessors of InstructGPT trained with it and eps 1e-5).
Betas (0.9, 0.95): InstructGPT appendix C. Eps, decay and clipping are not in the paper.

Sharded parameters (DTensor) are stepped where their rows lie; only the norm asks the other processes.

A tensor is gone through once (engine.kernels.adamw): the clip is a factor of that pass, and where the weights' compute
copy and their average are given, the same pass writes both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from engine.errors import CheckpointError, ConfigError
from engine.kernels.adamw import Stepped, adamw_steps, bias_corrections, grad_norm
from engine.kernels.linear import PackedWeight
from engine.run.distributed import local, norm_over_shards
from engine.run.ema import EMA

# A gradient above this has a square that float32 cannot hold: the second moment would be infinite from then on.
LARGEST = math.sqrt(torch.finfo(torch.float32).max)
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
    """`grad_norm` before clipping; `skipped` says that it was not finite, or too large, and no weight moved."""

    grad_norm: float
    skipped: bool


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: a matrix, and not a table of embeddings."""
    return parameter.dim() >= 2 and EMBEDDING_NAMES.isdisjoint(name.split("."))


def global_norm(tensors: Iterable[Tensor]) -> float:
    """sqrt(sum of squares) over all elements of all tensors.

    float64 throughout, in a fixed order: the same bits for any number of threads. Of sharded tensors all shards count,
    and all ranks call.
    """
    parts = list(tensors)
    return float(norm_over_shards(grad_norm([local(part) for part in parts]), parts))


class ComputeCopy(Protocol):
    """What a step renews beside the masters: engine.model.storage.Weights."""

    def master(self, name: str) -> Tensor | None: ...
    def written_by_step(self, name: str) -> PackedWeight | Tensor | None: ...
    def step_taken(self, names: Collection[str]) -> None: ...


class Optimizer:
    """One Adam over named parameters; the learning rate is given at each step.

    `parameters` must be float32 and every one of them must have a gradient at `step`. With `weights`, whose masters
    they are, a step leaves the compute copy new and its version one higher: no `refresh` is due. With `ema` of the
    same parameters it takes the new weights into the average.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: OptimizerConfig | None = None,
        weights: ComputeCopy | None = None,
        ema: EMA | None = None,
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
        for name, parameter in self.parameters.items():
            if weights is not None and weights.master(name) is not parameter:
                raise ConfigError(f"optimizer: got weights whose master is not {name}, want those of the parameters")
            if ema is not None and ema.parameters.get(name) is not parameter:
                raise ConfigError(f"optimizer: got an average without {name}, want one of the same parameters")
        self._weights, self._ema = weights, ema
        self._exp_avg = {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}
        self._exp_avg_sq = {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def grad_norm(self) -> float:
        """The global norm of the gradients gathered so far; one that is missing counts as 0."""
        return global_norm(p.grad for p in self.parameters.values() if p.grad is not None)

    def step(self, lr: float, max_grad_norm: float | None = None) -> StepResult:
        """Step with gradients clipped to a global norm of `max_grad_norm` (None: not), which stay as they are.

        A norm that is not finite, or that float32 cannot square, moves nothing, neither weights nor moments nor the
        step count: the result says so and `skipped` counts it. Raises `RuntimeError` when a parameter has no gradient,
        which is a mistake of the caller's loss.
        """
        without = [name for name, p in self.parameters.items() if p.grad is None]
        if without:
            raise RuntimeError(
                f"optimizer: {len(without)} of {len(self.parameters)} parameters have no gradient "
                f"({', '.join(without[:5])}, ...); want a backward pass that reaches all of them"
            )
        norm = self.grad_norm()
        clipped = max_grad_norm is not None and norm > max_grad_norm
        scale = max_grad_norm / norm if clipped and max_grad_norm is not None else 1.0
        if not norm * scale < LARGEST:  # nan too
            self.skipped += 1
            return StepResult(norm, skipped=True)
        self.move(lr, scale)
        self.steps += 1
        return StepResult(norm, skipped=False)

    def move(self, lr: float, clip_scale: float) -> None:
        """One pass over each tensor with gradients times `clip_scale`; `step` without its checks and its count."""
        beta1, beta2 = self.config.betas
        corrections = bias_corrections(beta1, beta2, self.steps + 1)
        eps = self.config.eps / (corrections[1] if self.config.eps_style == "tf" else 1.0)
        averages = {} if self._ema is None else self._ema.within_step()
        decay = 0.0 if self._ema is None else self._ema.decay
        stepped = [self._stepped(name, averages.get(name)) for name in self.parameters]
        adamw_steps(stepped, lr, beta1, beta2, eps, *corrections, clip_scale, decay)
        if self._weights is not None:
            self._weights.step_taken(self.parameters)

    def _stepped(self, name: str, average: Tensor | None) -> Stepped:
        parameter = self.parameters[name]
        assert parameter.grad is not None
        return Stepped(
            local(parameter),
            local(parameter.grad),
            local(self._exp_avg[name]),
            local(self._exp_avg_sq[name]),
            None if self._weights is None else self._weights.written_by_step(name),
            None if average is None else local(average),
            self.config.weight_decay if decays(name, parameter) else 0.0,
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, plus the count of skipped steps. Not copies."""
        tensors = {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "skipped": torch.tensor(self.skipped, dtype=torch.int64),
        }
        for name in self.parameters:
            tensors[f"exp_avg.{name}"] = self._exp_avg[name]
            tensors[f"exp_avg_sq.{name}"] = self._exp_avg_sq[name]
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
        for name in self.parameters:
            self._exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self._exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])
