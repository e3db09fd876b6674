"""The denoising step of the current forward pass, for layers that depend on the step."""

from collections.abc import Sequence

from calib.base.errors import CalibError


class Clock:
    """Maps the timestep of a forward pass to the nearest step of a trajectory.

    Args:
        timesteps: timesteps of steps 0 … n - 1, descending. Sampling with another number of steps meets timesteps in
            between. Empty where nothing depends on the step, which then is always 0.
    """

    def __init__(self, timesteps: Sequence[float]):
        self._timesteps = list(timesteps)
        self._step: int | None = None

    def set_timestep(self, timestep: float | None) -> None:
        """Set the timestep of the next forward pass; None where its rows differ in timestep."""
        if timestep is None:
            self._step = None
            return
        distances = [abs(t - timestep) for t in self._timesteps]
        self._step = distances.index(min(distances)) if distances else 0

    @property
    def step(self) -> int:
        """Step index of the current forward pass.

        Raises:
            CalibError: the rows of the forward pass differ in timestep.
        """
        if self._step is None:
            raise CalibError("a layer that follows the step was run on rows of several steps; run them step by step")
        return self._step
