"""Timestep schedules: the choice of a trajectory's states for collection.

States are numbered 0 (pure noise) to n = num_steps (the finished latent). Every schedule is a function of
``num_steps`` and its own parameters that returns sorted, distinct step indices. A function from your own package
becomes an option when a YAML file under ``timestep_schedule/`` names it as ``_target_``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from calib.base.errors import ConfigError
from calib.base.seeds import generator

import numpy as np

GROUP = "timestep_schedule"


def _check_count(count: int, num_steps: int, at_least: int = 1) -> None:
    if not at_least <= count <= num_steps + 1:
        raise ConfigError.bad_value(
            f"{GROUP}.count", count, f"must be {at_least} to {num_steps + 1}, as sampler.num_steps={num_steps}"
        )


def key(num_steps: int) -> list[int]:
    """Both ends, the quarters, every third state of the middle third and every fifth of the outer thirds.

    The schedule of the scripts that calib started from; 17 states for 50 steps.
    """
    n = num_steps
    steps = {0, n, n // 4, n // 2, 3 * n // 4}
    steps |= set(range(n // 3, 2 * n // 3, 3)) | set(range(0, n // 3, 5)) | set(range(2 * n // 3, n, 5))
    return sorted(steps)


def all_states(num_steps: int) -> list[int]:
    """Every state, 0 … n."""
    return list(range(num_steps + 1))


def evenly(last: int, count: int) -> list[int]:
    """At most ``count`` integers evenly spaced over 0 … ``last``, both ends included; 0 alone where ``count`` is 1."""
    return sorted({round(i * last / max(1, count - 1)) for i in range(count)})


def uniform(num_steps: int, count: int = 17) -> list[int]:
    """``count`` states evenly spaced over 0 … n, both ends included (Q-Diffusion, arXiv 2302.04304, takes 20)."""
    _check_count(count, num_steps, at_least=2)
    return evenly(num_steps, count)


def stride(num_steps: int, every: int = 3) -> list[int]:
    """States 0, every, 2·every, … up to n."""
    if every < 1:
        raise ConfigError.bad_value(f"{GROUP}.every", every, "must be 1 or more")
    return list(range(0, num_steps + 1, every))


def quarters(num_steps: int) -> list[int]:
    """States 0, n/4, n/2, 3n/4 and n."""
    return sorted({i * num_steps // 4 for i in range(5)})


def taqdit(num_steps: int) -> list[int]:
    """25 states, ⌊linspace(0, n-1, 25)⌋ (TaQ-DiT, arXiv 2411.14172, section IV-A, for n = 100)."""
    return sorted({k * (num_steps - 1) // 24 for k in range(25)})


def ndtc(num_steps: int, count: int = 17, seed: int = 0) -> list[int]:
    """``count`` distinct states drawn towards the clean end (PTQ4DM, arXiv 2211.15736, section 3.3).

    t ~ N(0.4, 0.4²)·n, clamped to 0 … n, counted from the clean end: the step index is n - t.
    """
    _check_count(count, num_steps)
    rng = generator(f"{GROUP}.seed", seed)
    chosen: set[int] = set()
    while len(chosen) < count:
        t = int(np.clip(rng.normal(0.4, 0.4) * num_steps, 0, num_steps))
        chosen.add(num_steps - t)
    return sorted(chosen)


def phase_bounds(num_steps: int) -> dict[str, tuple[int, int]]:
    """First and last state of the phases early, mid and late; mid begins at 0.3 n, late at 0.7 n, rounded."""
    early_end, mid_end = round(0.3 * num_steps), round(0.7 * num_steps)
    return {"early": (0, early_end - 1), "mid": (early_end, mid_end - 1), "late": (mid_end, num_steps)}


def phases(num_steps: int, early: int = 4, mid: int = 9, late: int = 4) -> list[int]:
    """``early``, ``mid`` and ``late`` states of the phases of these names, evenly spaced within each."""
    steps: set[int] = set()
    for name, count in {"early": early, "mid": mid, "late": late}.items():
        first, last = phase_bounds(num_steps)[name]
        if not 0 <= count <= max(last - first + 1, 0):
            raise ConfigError.bad_value(
                f"{GROUP}.{name}", count, f"must be 0 to {last - first + 1}, the states of that phase"
            )
        steps |= {round(step) for step in np.linspace(first, last, count)}
    return sorted(steps)


@dataclass(frozen=True)
class DriftSchedule:
    """A schedule of ``count`` states chosen by the statistics of the first ``images`` images at every state."""

    count: int
    images: int


def drift(num_steps: int, count: int = 17, images: int = 8) -> DriftSchedule:
    """``count`` states that differ most from one another in the statistics of ``images`` images.

    Greedy: state 0, then repeatedly the state farthest from those chosen (see :mod:`calib.activations.choose_steps`),
    among the states that the sampler feeds to the model; the finished latent is not among them.
    """
    if not 1 <= count <= num_steps:
        allowed = f"must be 1 to {num_steps}, as sampler.num_steps={num_steps}"
        raise ConfigError.bad_value(f"{GROUP}.count", count, allowed)
    if images < 1:
        raise ConfigError.bad_value(f"{GROUP}.images", images, "must be 1 or more")
    return DriftSchedule(count, images)


def from_list(num_steps: int, steps: Sequence[int] = ()) -> list[int]:
    """The listed states."""
    if not steps:
        raise ConfigError(f"{GROUP}.steps=[]: name at least one step, e.g. {GROUP}.steps=[0,10,{num_steps}]")
    for step in steps:
        if not 0 <= step <= num_steps:
            allowed = f"every step index must be in 0 … {num_steps} (sampler.num_steps)"
            raise ConfigError.bad_value(f"{GROUP}.steps", step, allowed)
    return list(steps)
