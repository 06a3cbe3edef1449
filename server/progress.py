"""The bar that shows how far a picture is, on a terminal only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """Steps of one picture."""

    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress = progress
        self._task = task

    def advance(self) -> None:
        """One step was done."""
        self._progress.advance(self._task)

    def reach(self, what: str, step: int | None = None, total: int | None = None) -> None:
        """Show `what` is happening, and `step` of `total` where that is known."""
        self._progress.update(self._task, description=what, completed=step, total=total)


@contextmanager
def progress_bar(total: int | None = None) -> Iterator[Bar]:
    """A bar of `total` steps on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    what = TextColumn("{task.description}")
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task("drawing", total=total))
