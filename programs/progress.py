"""The progress of a training run on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from danaus.actors import StepMetrics


class TrainingBar:
    """A progress bar on a terminal; elsewhere, about twenty lines over the whole run.

    Args:
        num_steps: Steps of the run.

    Raises:
        ImportError: ``rich`` is not installed.
    """

    def __init__(self, num_steps: int) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError as error:
            raise ImportError("the progress bar needs the package `rich`: pip install 'danaus[train]'") from error
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_steps)
        self._num_steps = num_steps

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)

    def show(self, ranks: Iterable[StepMetrics]) -> None:
        """Show one step, from what all ranks say of it."""
        metrics = list(ranks)
        first = metrics[0]
        tokens_per_s = first.num_tokens / max(each.duration_s for each in metrics)
        memory_mib = max(each.memory_bytes for each in metrics) / 2**20
        text = f"loss {first.loss:.3f}  {tokens_per_s:,.0f} tokens/s  {memory_mib:,.0f} MiB per rank"
        self._progress.update(self._task, completed=first.step, description=text)
        if not self._console.is_terminal and first.step % max(1, self._num_steps // 20) == 0:
            self.say(f"step {first.step:>5} of {self._num_steps}  {text}")
