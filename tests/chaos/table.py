"""One line per row: what was done, what came of it, how long recovery took."""

from dataclasses import dataclass, field

from tests.chaos.history import Verdict

HEAD = ("row", "jobs", "faults", "lost", "duplicate", "p50 s", "p99 s", "took s", "result")
FORMAT = "{:<36}{:>7}{:>8}{:>6}{:>11}{:>8}{:>8}{:>8}  {}"


@dataclass
class Row:
    """One line of the table. `recovery_s` holds one value per job or fault that had to recover."""

    name: str
    faults: int
    verdict: Verdict = field(default_factory=Verdict)
    recovery_s: list[float] = field(default_factory=list)
    limit_s: float | None = None
    complaints: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        values = sorted(self.recovery_s)
        return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0

    def demand(self, holds: bool, complaint: str) -> None:
        """Note a complaint unless it holds."""
        if not holds:
            self.complaints.append(complaint)

    @property
    def holds(self) -> bool:
        slow = self.limit_s is not None and self.percentile(0.99) > self.limit_s
        return self.verdict.holds and not slow and not self.complaints


def line(row: Row, took_s: float) -> str:
    """One line of the table."""
    verdict = row.verdict
    shown = [f"{row.percentile(p):.2f}" if row.recovery_s else "-" for p in (0.5, 0.99)]
    told = "pass" if row.holds else f"FAIL {'; '.join(row.complaints[:3])}"
    if verdict.unexpected:
        told += f" ({len(verdict.unexpected)} unexpected)"
    if verdict.unreadable:
        told += f" ({len(verdict.unreadable)} without a picture)"
    return FORMAT.format(
        row.name, verdict.jobs, row.faults, len(verdict.lost), len(verdict.duplicate), *shown,
        f"{took_s:.0f}", told,
    )  # fmt: skip
