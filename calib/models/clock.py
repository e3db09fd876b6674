"""Which denoising step a forward is at, for layers that treat steps differently."""

from collections.abc import Sequence

from calib.base.errors import CalibError


class Clock:
    """Told the timestep before every forward; knows the step of the trajectory that is nearest to it.

    Args:
        timesteps: of steps 0 … n - 1, falling. Drawing with another number of steps meets timesteps in between. Empty
            where nothing varies with the step: it is 0 then, ever.
    """

    def __init__(self, timesteps: Sequence[float]):
        self._timesteps = list(timesteps)
        self._step: int | None = None

    def tell(self, timestep: float | None) -> None:
        """A forward begins at ``timestep``; None: its rows have timesteps of their own."""
        if timestep is None:
            self._step = None
            return
        distances = [abs(t - timestep) for t in self._timesteps]
        self._step = distances.index(min(distances)) if distances else 0

    @property
    def step(self) -> int:
        """The step index of the forward that is under way."""
        if self._step is None:
            raise CalibError("a layer that follows the step was run on rows of several steps; run them step by step")
        return self._step
