"""The disturbed side: the run is started again and again, each time something befalls it, until it is done."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.soak import SoakError, verdict
from bench.soak.faults import AT_THE_END, FAILED, KILLED, Fault, Plan, plain
from bench.soak.setting import KEEP, Setting
from bench.soak.start import Start, last_step, newest
from engine.run import checkpoint

LOST = 0.6  # of save_steps, at a start: half of them where nothing is saved first, more for a damaged checkpoint


def aimed_pace(left: int, seconds: float, start_s: float, iteration_s: float, lost: float) -> float:
    """Iterations a start so that `left` of them, with starts and lost ones, take so many seconds."""
    spare = seconds - left * iteration_s
    return (left * start_s + seconds * lost) / spare if spare > 0 else float("inf")


@dataclass
class Play:
    """Everything that the disturbed side knows; `faults` chooses among FAULTS."""

    setting: Setting
    out: Path
    faults: Sequence[Fault]
    pace: int
    seconds: float | None
    start_s: float
    iteration_s: float
    say: Callable[[str], None] = print
    rng: random.Random = field(init=False)
    count: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    at_the_end: bool = True  # the final model is hit, and the finished run started once more

    def __post_init__(self) -> None:
        self.rng = random.Random(self.setting.seed)
        self.began = time.monotonic()
        self._usual_pace, self._deck = self.pace, list[Fault]()
        self._excused: set[str] = set()
        self._model_was_hit = False

    def name(self, what: str) -> str:
        return f"{self.count}-{what.replace(' ', '-')}"

    def run(self) -> None:
        """Until the run is done; then once more, which changes nothing."""
        while not self.one(*self.drawn()):
            pass
        if self.at_the_end:
            self.once_more()

    def once_more(self) -> None:
        self.say("started once more, though it is done")
        self.count += 1
        with Start(self.setting, self.out, self.name("done")) as start:
            code = start.wait()
            self.counts["started when done"] += 1
            self.ends[f"exit code {code}"] += 1
            if code:
                raise SoakError(f"a finished run that is started again ends with {code}, want 0: {start.log}")
        self.after(start, 0, Plan())

    def drawn(self) -> tuple[Fault, Plan]:
        """The next of a shuffled deck whose moment this is; near the end the one that hits the final model."""
        left = self.setting.iterations - newest(self.out)[1]
        if self.seconds is not None:
            spent = time.monotonic() - self.began
            lost = LOST * self.setting.save_steps
            aim = aimed_pace(left, self.seconds - spent, self.start_s, self.iteration_s, lost)
            self.pace = round(min(max(aim, self._usual_pace / 2), 3 * self._usual_pace))
        if left <= 2 * self.pace and self.at_the_end and not self._model_was_hit:
            return AT_THE_END, AT_THE_END.plan(self) or Plan()
        while True:
            if not self._deck:
                self._deck = [*self.faults]
                self.rng.shuffle(self._deck)
            for fault in self._deck:
                plan = fault.plan(self)
                if plan is not None:
                    self._deck.remove(fault)
                    return fault, plan
            if len(self._deck) == len(self.faults):  # none of them: let it make its first checkpoints
                return Fault("SIGKILL after two checkpoints", (KILLED,), plain, self._two_checkpoints), Plan()
            self._deck = []

    def _two_checkpoints(self, _: object, start: Start) -> None:
        if start.wait_until(start.base + 2 * self.setting.save_steps + 1):
            start.kill()

    def one(self, fault: Fault, plan: Plan) -> bool:
        """One start with one fault; True when the run is done. Raises SoakError for what is not as it must be."""
        self.count += 1
        began = time.monotonic()
        with plan.around():
            start = Start(
                self.setting, self.out, self.name(fault.name), plan.inside, plan.flags, plan.heeds_rights
            )
            with start:
                fault.strike(self, start)
                code = start.wait()
        done = code == 0
        self.counts[fault.name] += 1
        self.ends[f"exit code {code}" if code >= 0 else f"signal {-code}"] += 1
        self.expect(fault, start, code)
        self.after(start, code, plan)
        if fault is AT_THE_END and code == KILLED:
            self._model_was_hit = True
        inside = f" {plan.inside}" if plan.inside else ""
        self.say(
            f"start {self.count}: {fault.name}{inside}: code {code}, iterations {start.base} to"
            f" {last_step(start.metrics)} of {self.setting.iterations}, {time.monotonic() - began:.1f} s"
        )
        return done

    def expect(self, fault: Fault, start: Start, code: int) -> None:
        """Its exit code and what it said; nothing lost where the run could save."""
        if code == 0:
            if not (self.out / "model.safetensors").exists() or start.step() < self.setting.iterations:
                raise SoakError(f"{fault.name}: exit code 0 at iteration {start.step()}, not done: {start.log}")
            return
        never_came = fault.codes == (FAILED,) and code == KILLED
        if code not in fault.codes and not never_came:
            wanted = ", ".join(map(str, fault.codes))
            raise SoakError(f"{fault.name}: ended with {code}, want {wanted}: {start.log}")
        if never_came:
            self.counts[f"{fault.name}, did not come"] += 1
            return
        if fault.says and not re.search(fault.says, start.printed()):
            raise SoakError(f"{fault.name}: does not say {fault.says!r}: {start.log}")
        if "Traceback" in start.printed() and code in (FAILED, 3) and fault.says:
            raise SoakError(f"{fault.name}: ended with a traceback: {start.log}")
        if fault.saves and newest(self.out)[1] < last_step(start.metrics):
            raise SoakError(
                f"{fault.name}: iteration {last_step(start.metrics)} is on record, but the newest checkpoint is"
                f" {newest(self.out)[0]}: {start.log}"
            )

    def after(self, start: Start, code: int, plan: Plan) -> None:
        """Checkpoints are whole, the start went on from the newest whole one, and nothing of it is left."""
        verdict.went_on_from(start, plan.damaged)
        broken = verdict.broken_checkpoints(self.out)
        if plan.damaged is not None:
            self._excused.add(plan.damaged.name)
        self._excused &= set(broken)
        new = [name for name in broken if name not in self._excused]
        half_removed = code == KILLED and len(new) == 1 and new[0] != verdict.plain_name(checkpoint.kept(self.out)[-1])
        if new and not half_removed:
            raise SoakError(f"after exit code {code} checkpoints are damaged: {[broken[name] for name in new]}")
        self._excused |= set(new)
        whole = len(checkpoint.kept(self.out)) - len(broken)
        if whole < min(KEEP, newest(self.out)[1] // self.setting.save_steps) and not self._excused:
            raise SoakError(f"{self.out}: only {whole} whole checkpoints are left, want {KEEP}")
        verdict.no_processes(self.setting.mark)
        verdict.no_temporary_files(self.setting.temporary)
