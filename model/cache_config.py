"""`teacache.json`: how a checkpoint's joint blocks may be skipped, as `trainer calibrate` measured.

The file is optional and looks like

    {"coefficients": [0.0, 0.0, 0.0, 1.1, 0.0],
     "presets": {"balanced": {"schedules": [
         {"sampler": "euler", "time_grid": "diffusers", "num_inference_steps": 30, "shift": 6.0,
          "computed": "111010101010101010101010101011"}]}}}

`coefficients` turn the change of the joint input into that of the joint output: a polynomial of
degree 4, highest power first. A schedule has one letter for every evaluation of its solver: 1 runs
the joint blocks, 0 does without. `measured` (in a preset) and `fit` (beside the coefficients) say
how good and how fast that was; nothing here reads them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointError, read_json
from model.flow import timestep_from_sigma
from model.request import CACHE_PRESETS, check_field, nearest
from model.samplers import OWN_GRID, Sampler, make_sampler

FILE_NAME = "teacache.json"
NUM_COEFFICIENTS = 5
_SECTIONS = ("coefficients", "presets", "fit")
_PRESET_KEYS = ("schedules", "measured")
_SCHEDULE_KEYS = ("sampler", "time_grid", "num_inference_steps", "shift", "computed")
_SETTINGS_KEYS = _SCHEDULE_KEYS[:-1]


@dataclass(frozen=True)
class SkipSchedule:
    """Which evaluations of one solver on one schedule run the joint blocks.

    Attributes:
        sampler: a key of `model.samplers.SAMPLERS`.
        timesteps: of every evaluation, ascending (0 = noise).
        computed: whether it runs the joint blocks; the first and the last do.
        shift: resolution shift it was measured at.
    """

    sampler: str
    timesteps: tuple[float, ...]
    computed: tuple[bool, ...]
    shift: float

    def stretched(self, timesteps: Sequence[float]) -> tuple[bool, ...]:
        """This schedule on other timesteps: about the same share computed, at the same noise.

        Every evaluation stands for the span up to the next. What share of its own span the
        measured schedule computes, summed along the way, says when the next one is due.

        Args:
            timesteps: of every evaluation, ascending.
        """
        count = len(timesteps)
        before = [0, *_running_sum(self.computed)]
        ends = [_position(self.timesteps, t) for t in (*timesteps[1:], 1.0)]
        starts = [_position(self.timesteps, t) for t in timesteps]
        share = count / len(self.timesteps)
        computed: list[bool] = []
        due = 0.0
        for start, end in zip(starts, ends, strict=True):
            due += share * (_at(before, end) - _at(before, start))
            computed.append(not computed or due >= 0.5)
            due = min(due - 1.0, 1.0) if computed[-1] else due
        computed[-1] = True
        return tuple(computed)


@dataclass(frozen=True)
class CacheConfig:
    """The contents of `teacache.json`.

    Attributes:
        coefficients: of the polynomial for numeric thresholds, highest power first; None where
            the file has none.
        schedules: preset name -> its skip schedules.
    """

    coefficients: tuple[float, ...] | None
    schedules: Mapping[str, tuple[SkipSchedule, ...]]

    def plan(
        self, preset: str, sampler_name: str, sampler: Sampler, shift: float | None
    ) -> tuple[bool, ...] | None:
        """Whether each evaluation of `sampler` computes; None where the file lacks the preset.

        Of the schedules of the preset the nearest is taken: of the same solver if there is one,
        then by step count and shift.

        Args:
            preset: a name of `CACHE_PRESETS`.
            sampler_name: the key under which `sampler` is known.
            sampler: of the request.
            shift: of the request; None where it brought its own sigmas.
        """
        offered = self.schedules.get(preset, ())
        if not offered:
            return None
        count = sampler.num_evaluations

        def distance(schedule: SkipSchedule) -> tuple[bool, float]:
            shifts = 0.0 if shift is None else abs(math.log(shift / schedule.shift))
            steps = abs(math.log(count / len(schedule.computed)))
            return schedule.sampler != sampler_name, steps + shifts

        return min(offered, key=distance).stretched(evaluation_timesteps(sampler))


def evaluation_timesteps(sampler: Sampler) -> tuple[float, ...]:
    """The timestep of every evaluation of a solver, ascending."""
    return tuple(
        timestep_from_sigma(sampler.sigma_at(index)) for index in range(sampler.num_evaluations)
    )


def load_cache_config(folder: Path) -> CacheConfig | None:
    """Read a checkpoint folder's `teacache.json`; None where there is none.

    Raises:
        CheckpointError: one line naming the file, the entry and what is allowed.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    content = read_json(path)
    _check_keys("", content, _SECTIONS)
    presets = _object("presets", content.get("presets", {}))
    for name, preset in presets.items():
        if name not in CACHE_PRESETS:
            raise _fault(f"unknown preset {name!r}: only {' and '.join(CACHE_PRESETS)} are known")
        _check_keys(f"preset {name!r}: ", _object(f"preset {name!r}", preset), _PRESET_KEYS)
    return CacheConfig(
        coefficients=_coefficients(content.get("coefficients")),
        schedules={name: _schedules(name, preset) for name, preset in presets.items()},
    )


def _coefficients(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != NUM_COEFFICIENTS
        or not all(map(_finite, value))
    ):
        raise _fault(f"coefficients must be {NUM_COEFFICIENTS} numbers, the highest power first")
    return tuple(map(float, value))


def _schedules(preset: str, content: Mapping[str, Any]) -> tuple[SkipSchedule, ...]:
    entries = content.get("schedules")
    if not isinstance(entries, list) or not entries:
        raise _fault(f"preset {preset!r}: schedules must be a list of at least one")
    return tuple(_schedule(f"preset {preset!r}: schedule {i}", e) for i, e in enumerate(entries, 1))


def _schedule(where: str, entry: object) -> SkipSchedule:
    entry = _object(where, entry)
    _check_keys(f"{where}: ", entry, _SCHEDULE_KEYS)
    settings: dict[str, Any] = {name: entry.get(name) for name in _SETTINGS_KEYS}
    try:
        for name, value in settings.items():
            if name != "time_grid" or settings["sampler"] != OWN_GRID:
                check_field(name, value)
        sampler = make_sampler(name=settings.pop("sampler"), **settings)
    except ValueError as error:
        raise _fault(f"{where}: {error}") from None
    return SkipSchedule(
        sampler=entry["sampler"],
        timesteps=evaluation_timesteps(sampler),
        computed=_computed(where, entry.get("computed"), sampler.num_evaluations),
        shift=float(entry["shift"]),
    )


def _computed(where: str, letters: object, count: int) -> tuple[bool, ...]:
    right = isinstance(letters, str) and len(letters) == count and set(letters) <= {"0", "1"}
    if right and str(letters).startswith("1") and str(letters).endswith("1"):
        return tuple(letter == "1" for letter in str(letters))
    raise _fault(
        f"{where}: computed {str(letters)[:60]!r} is not allowed: give {count} letters 1 or 0, one "
        "for each evaluation; the first and the last are 1"
    )


def _check_keys(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in content:
        if name not in known:
            raise _fault(f"{where}unknown key {name!r}{nearest(name, known)}")


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fault(f"{where} must be a JSON object")
    return value


def _finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _fault(sentence: str) -> CheckpointError:
    return CheckpointError(f"{FILE_NAME}: {sentence}")


def _running_sum(computed: Sequence[bool]) -> list[int]:
    total, sums = 0, []
    for each in computed:
        total += each
        sums.append(total)
    return sums


def _position(timesteps: Sequence[float], timestep: float) -> float:
    """Where a timestep lies among ascending ones: 2.5 is midway between number 2 and 3."""
    knots = (*timesteps, 1.0)
    if timestep <= knots[0]:
        return 0.0
    index = min(bisect_right(knots, timestep), len(knots) - 1) - 1
    left, right = knots[index], knots[index + 1]
    return index + min(1.0, (timestep - left) / (right - left))


def _at(values: Sequence[int], position: float) -> float:
    """Linear interpolation between neighbouring values."""
    index = min(int(position), len(values) - 2)
    return values[index] + (position - index) * (values[index + 1] - values[index])
