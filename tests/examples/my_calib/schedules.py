"""Timestep schedules of my own."""


def last(num_steps: int, count: int = 5) -> list[int]:
    """The last states that the model sees before the finished latent."""
    return list(range(max(0, num_steps - count), num_steps))
