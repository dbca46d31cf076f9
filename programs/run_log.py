"""What a training run has done so far, kept in its folder so that a later run can go on with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from danaus import MeshFailure
    from danaus.actors import StepMetrics

_FILE = "run.json"
_FEW = 3
_ADVICE = "pip install 'danaus[train]'"


@dataclass(slots=True)
class RunLog:
    """The course of a run; also what the program returns.

    Attributes:
        out: Folder of its files.
        losses: Mean loss of each step's batch, by number of completed steps.
        held_out: Loss on held-out text, likewise.
        lost: Ranks that were lost, in order.
        recoveries: Seconds from the loss of a rank to the next step that had not been done before, by that step.
        state_hash: Hash of the final state, equal on all ranks.
        sample: What the model wrote at the end.
    """

    out: Path
    losses: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    recoveries: dict[int, float] = field(default_factory=dict)
    lost: list[MeshFailure] = field(default_factory=list)
    state_hash: str = ""
    sample: str = ""
    _lost_at_s: float | None = None

    def on_step(self, metrics: StepMetrics, *, now_s: float) -> None:
        """Take in one step, which may be one that was completed before."""
        is_new = metrics.step > max(self.losses, default=0)
        self.losses[metrics.step] = metrics.loss
        if is_new and self._lost_at_s is not None:
            self.recoveries[metrics.step] = now_s - self._lost_at_s
            self._lost_at_s = None

    def on_rank_lost(self, failure: MeshFailure) -> bool:
        """Note the loss of a rank; return whether it is news, since more than one call may fail by it."""
        if any((known.rank, known.incarnation) == (failure.rank, failure.incarnation) for known in self.lost):
            return False
        self.lost.append(failure)
        if self._lost_at_s is None:
            self._lost_at_s = failure.at_s
        return True

    def write(self) -> None:
        """Keep the losses in the run's folder."""
        part = self.out / f"{_FILE}.part"
        part.write_text(json.dumps({"losses": self.losses, "held_out": self.held_out}))
        part.replace(self.out / _FILE)

    @classmethod
    def read(cls, out: Path, *, up_to: int) -> RunLog:
        """Return what is known of the first ``up_to`` steps of the run in ``out``; nothing where it kept nothing."""
        path = out / _FILE
        kept = json.loads(path.read_text()) if path.is_file() else {"losses": {}, "held_out": {}}
        losses, held_out = (
            {int(step): loss for step, loss in kept[name].items() if int(step) <= up_to}
            for name in ("losses", "held_out")
        )
        return cls(out, losses, held_out)

    def plot(self) -> Path:
        """Draw the losses, and where ranks were lost, into ``loss.png`` in the run's folder.

        Raises:
            ImportError: ``matplotlib`` is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"the loss plot needs the package `matplotlib`: {_ADVICE}") from error
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
        axes.plot(
            sorted(self.losses), [self.losses[step] for step in sorted(self.losses)], label="training", linewidth=1
        )
        axes.plot(sorted(self.held_out), [self.held_out[step] for step in sorted(self.held_out)], "o", label="held out")
        for number, step in enumerate(self.recoveries):
            axes.axvline(step, color="tab:red", linestyle="--", linewidth=1, label="" if number else "rank lost")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(self.out / "loss.png", dpi=120)
        return self.out / "loss.png"

    def summary(self) -> str:
        """Return what became of the run, in a few lines."""
        first, last = min(self.losses), max(self.losses)
        lines = [f"loss {self.losses[first]:.3f} at step {first}, {self.losses[last]:.3f} at step {last}"]
        if len(self.recoveries) <= _FEW:
            lines += [
                f"a rank was lost before step {step} was done: {seconds:.2f} s until it was"
                for step, seconds in self.recoveries.items()
            ]
        else:
            taken_s = self.recoveries.values()
            lines.append(
                f"ranks were lost before {len(taken_s)} steps were done: "
                f"median {median(taken_s):.2f} s until they were, longest {max(taken_s):.2f} s"
            )
        lines += [
            f"all replicas are equal to the last bit, state {self.state_hash[:16]}",
            f"files of the run: {self.out}",
        ]
        return "\n".join(lines)
