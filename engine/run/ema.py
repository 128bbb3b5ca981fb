"""The running average of the policy's weights (InstructGPT C.4: decay 0.992).

    e <- decay e + (1 - decay) w,  e_0 = the starting weights, no bias correction

A decay of 0.992 remembers about 125 updates (half-life 86).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError


class EMA:
    """Averages of named parameters, in their own dtype (the fp32 masters of a run).

    `parameters` is read at every `update` and written only inside `swapped`. An `Optimizer` that is given this updates
    it within its steps, to the same bits on the CPU: then nobody calls `update`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float = 0.992) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA: got decay {decay}, want 0 <= decay < 1")
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._is_swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights into the average: once after each optimizer step."""
        self._refuse_while_swapped("update")
        for name, parameter in self.parameters.items():
            # Three operations of one rounding each. A fused multiply-add would round otherwise in
            # the vector body than in the scalar tail, whose place depends on the threads.
            difference = parameter.detach() - self.averages[name]
            self.averages[name].add_(difference.mul_(1 - self.decay))

    def within_step(self) -> dict[str, Tensor]:
        """The averages by name, for a step that takes the new weights into them in its own pass. Not copies."""
        self._refuse_while_swapped("within_step")
        return self.averages

    def state(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint or for saving the averaged model. Not copies."""
        self._refuse_while_swapped("state")
        return dict(self.averages)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave. Raises `CheckpointError` when names or shapes differ."""
        self._refuse_while_swapped("load_state")
        if state.keys() != self.averages.keys():
            missing = sorted(self.averages.keys() - state.keys())
            extra = sorted(state.keys() - self.averages.keys())
            raise CheckpointError(
                f"EMA: the checkpoint lacks {missing} and has {extra} too many; "
                "want the checkpoint of a run of the same model"
            )
        for name, average in self.averages.items():
            if state[name].shape != average.shape or state[name].dtype != average.dtype:
                raise CheckpointError(
                    f"EMA: {name} is {tuple(state[name].shape)} {state[name].dtype} in the "
                    f"checkpoint, want {tuple(average.shape)} {average.dtype}"
                )
            average.copy_(state[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the averages (to evaluate or save); the weights come back.

        Whoever keeps a compute copy of the parameters must refresh it on the way in and out.
        """
        self._refuse_while_swapped("swapped")
        self._exchange()
        self._is_swapped = True
        try:
            yield
        finally:
            self._exchange()
            self._is_swapped = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(held)

    def _refuse_while_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(
                f"EMA.{what}: the parameters hold the averages; leave swapped() first"
            )
