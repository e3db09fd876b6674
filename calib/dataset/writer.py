"""Write drawn images on a separate thread while the next block is drawn."""

import errno
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from calib.base.errors import CalibError, in_a_line, reason_of
from calib.base.progress import counted
from calib.dataset.images import DREW_NAN, DrawnImage, write_image
from calib.dataset.manifest import ImageEntry, Manifest
from calib.dataset.shards import add_entries
from calib.dataset.store import StateDtype, UnstorableLatents
from calib.models.model import DiffusionModel

#: The manifest is rewritten when this multiple of the last rewriting's duration has passed: with a hundred thousand
#: images it takes seconds, which must not delay every block. Images that are not listed yet are lost to a kill.
LISTING_SHARE = 20


class _WriteError(Exception):
    """An OSError of the writing thread, as distinct from those of drawing."""


class Writer:
    """Writes drawn blocks, at most one at a time waiting, so that memory stays constant.

    Attributes:
        submitted: number of images handed over.
        done: number of images written and listed in the manifest.
        left_out: images that could not be stored, by the reason.
    """

    def __init__(self, data_dir: Path, manifest: Manifest, total: int, pool: ThreadPoolExecutor):
        self.data_dir, self.manifest, self._total, self._pool = data_dir, manifest, total, pool
        self.submitted, self.done = 0, 0
        self.left_out: dict[str, list[int]] = {}
        self._unlisted: list[ImageEntry] = []
        self._listed, self._listing_seconds = time.monotonic(), 0.0
        self._pending: Future[None] | None = None

    def submit(self, images: list[DrawnImage]) -> None:
        """Start writing ``images``, after waiting for those handed over before."""
        self._wait()
        self.submitted += len(images)
        self._pending = self._pool.submit(self._write, images)

    def finish(self) -> None:
        """Finish writing, and list all written images in the manifest."""
        try:
            self._wait()
        finally:
            self._list()

    def kept(self) -> str:
        """The number of finished images, for messages."""
        return f"{self.done} of {counted(self._total, 'image')} done and kept in {self.data_dir}"

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except OSError as error:
                raise _WriteError from error

    def _write(self, images: list[DrawnImage]) -> None:
        for image in images:
            try:
                self._unlisted.append(write_image(self.data_dir, self.manifest, image))
            except UnstorableLatents as error:
                self.left_out.setdefault(str(error), []).append(image.image_id)
        if time.monotonic() - self._listed >= LISTING_SHARE * self._listing_seconds:
            self._list()

    def _list(self) -> None:
        if not self._unlisted:
            return
        start = time.monotonic()
        try:
            add_entries(self.data_dir, self._unlisted)
        except OSError as error:
            raise _WriteError from error
        self.done += len(self._unlisted)
        self._unlisted.clear()
        self._listed = time.monotonic()
        self._listing_seconds = self._listed - start


@contextmanager
def writing(data_dir: Path, manifest: Manifest, total: int, model: DiffusionModel) -> Iterator[Writer]:
    """Yield a :class:`Writer`; at the end all blocks are written and listed, and errors report what is finished."""
    with ThreadPoolExecutor(1) as pool:
        writer = Writer(data_dir, manifest, total, pool)
        try:
            try:
                yield writer
            except BaseException:
                with suppress(_WriteError):  # the first error is the one to report
                    writer.finish()
                raise
            writer.finish()
        except KeyboardInterrupt as interrupt:
            interrupt.args = (f"{writer.kept()}; the same command goes on from there",)
            raise
        except _WriteError as error:
            raise _explained(error.__cause__, writer) from error.__cause__
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # what MLX raises when the device fails or its memory is full
                raise
            smaller = ["a smaller sampler.batch_size"] if manifest.batch_size != 1 else []
            remedies = [*smaller, "a smaller sampler.image_size", *filter(None, [model.smaller_text])]
            raise CalibError(
                f"the device failed ({reason_of(error)}); {writer.kept()}. If its memory was full: another data_dir "
                f"with {' or '.join(remedies)}"
            ) from error
    if writer.left_out:
        reasons = [f"{_numbered(ids)}: {reason}" for reason, ids in writer.left_out.items()]
        remedies = [_remedy(reason, manifest, model) for reason in writer.left_out]
        raise CalibError(f"{'; '.join(reasons)}: left out; {writer.kept()}. {'; '.join(dict.fromkeys(remedies))}")


def _numbered(ids: Sequence[int]) -> str:
    first = ", ".join(map(str, ids[:5]))
    return f"image{'s' if len(ids) > 1 else ''} {first}" + (f", … ({len(ids)} in all)" if len(ids) > 5 else "")


def _remedy(reason: str, manifest: Manifest, model: DiffusionModel) -> str:
    """What to change for images that were left out for ``reason``: nothing that is as advised already."""
    if reason != DREW_NAN and manifest.dtype == StateDtype.FLOAT16:
        return "dataset.dtype=float32 (or bfloat16) holds them, in another data_dir"
    computed = str(model.dtype).rpartition(".")[2]
    if reason == DREW_NAN and computed != "float32":
        return f"model.dtype=float32 may not (it is {computed})"
    guidance = f"sampler.cfg_weight={manifest.cfg_weight}, " if manifest.cfg_weight else ""
    return f"types are as wide as they can be: see {guidance}sampler.shift={manifest.shift} and the model's weights"


def _explained(error: BaseException | None, writer: Writer) -> CalibError:
    assert isinstance(error, OSError)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room" if full else "mend that"
    return CalibError(f"{in_a_line(error, writer.data_dir)}; {writer.kept()}: {remedy} and run the same command again")
