"""Where quantizers keep what takes too much memory."""

from pathlib import Path
from tempfile import gettempdir

from calib.base.errors import CalibError
from calib.base.files import free_bytes
from calib.base.progress import note, readable_bytes


def folder_for(nbytes: int, what: str, why: str, scratch: Path | None) -> Path:
    """The folder for ``nbytes`` of ``what``: ``scratch``, or that of temporary files; a note says so, and ``why``.

    Raises:
        CalibError: it lacks the room.
    """
    folder = Path(gettempdir()) if scratch is None else scratch
    size = f"{readable_bytes(nbytes)} of {what}"
    if (free := free_bytes(folder)) < nbytes:
        remedy = "choose another cache_dir, or fewer calibration.images or calibration.steps"
        raise CalibError(f"{folder}: {size} are to be kept there, and {readable_bytes(free)} are free; {remedy}")
    note(f"{size} are kept in {folder}, {why}")
    return folder
