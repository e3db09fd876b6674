"""``activations.h5``: statistics of a run's layers and steps, in plain HDF5.

Opens in h5py, h5dump and xarray without plugins. Field by field:

- ``/step_index`` (steps): dimension scale; ``/sigma``, ``/timestep``, ``/evaluated_by_sampler`` lie along it.
- ``/weight_bits``: dimension scale of the bit-widths of ``weight_sqnr``.
- ``/layers/<name>``, a group for each layer: ``channel`` (channels) a dimension scale; ``channel_min``,
  ``channel_max``, ``channel_mean``, ``channel_std``, ``channel_count`` as (steps, channels); a sparse histogram of each
  step: ``histogram_keys`` and ``histogram_counts``, those of step s from ``histogram_offsets[s]`` to
  ``histogram_offsets[s + 1]``; ``nan_count`` and ``inf_count`` (steps); ``weight_sqnr`` (bits), dB, where the
  layer's weights can be quantized. Layers that read one array share its datasets by hard link.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from calib.activations.collect import LayerActivations
from calib.activations.histogram import Histogram
from calib.activations.statistics import Statistics, merge_all
from calib.activations.weights import WEIGHT_BITS
from calib.dataset.manifest import Manifest
from calib.errors import CalibError
from calib.files import replacing

import h5py
import numpy as np

FORMAT, FORMAT_VERSION = "calib-activations", 1
FILE = "activations.h5"
CHUNK_BYTES = 1 << 20


def write_activations(
    path: Path,
    layers: Mapping[str, LayerActivations],
    steps: Sequence[int],
    manifest: Manifest,
    weight_sqnr: Mapping[str, Mapping[int, float]],
    attributes: Mapping[str, str],
) -> None:
    """Write ``layers`` as observed at ``steps``; ``attributes`` become root attributes beside format and version."""
    # Unlocked by HDF5: the temporary file is locked already.
    with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        own = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_steps": manifest.num_steps}
        file.attrs.update(own | dict(attributes))
        _add_scale(file, "step_index", np.asarray(steps, np.int64))
        file.create_group("layers", track_order=True)
        _add_scale(file, "weight_bits", np.asarray(WEIGHT_BITS, np.int64))
        along_steps = {
            "sigma": np.asarray([manifest.sigmas[step] for step in steps], np.float32),
            "timestep": np.asarray([manifest.timesteps[step] for step in steps], np.float32),
            "evaluated_by_sampler": np.asarray([step < manifest.num_steps for step in steps]),
        }
        for name, values in along_steps.items():
            file[name] = values
            file[name].dims[0].attach_scale(file["step_index"])
        for name, layer in layers.items():
            first = _write_layer(file, name, layer, steps)
            for alias in layer.point.aliases if name == layer.point.name else ():
                group = file.create_group(f"layers/{alias}")
                group.attrs.update(first.attrs)
                for dataset in first:
                    group[dataset] = first[dataset]
        for name, sqnr in weight_sqnr.items():
            if sqnr and f"layers/{name}" in file:
                values = np.asarray([sqnr[bits] for bits in WEIGHT_BITS])
                dataset = file[f"layers/{name}"].create_dataset("weight_sqnr", data=values)
                dataset.dims[0].attach_scale(file["weight_bits"])


def _add_scale(group: h5py.Group, name: str, values: np.ndarray) -> None:
    group[name] = values
    group[name].make_scale(name)


def _compressed(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    rows = max(1, CHUNK_BYTES // max(1, values[:1].nbytes))
    chunks = (max(1, min(rows, len(values))), *values.shape[1:])
    return group.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True, fletcher32=True)


def _write_layer(file: h5py.File, name: str, layer: LayerActivations, steps: Sequence[int]) -> h5py.Group:
    observed = [layer.steps[step] for step in steps]
    group = file.create_group(f"layers/{name}")
    group.attrs.update(
        {
            "encoding-type": "layer-statistics",
            "encoding-version": "1",
            "channels": observed[0].channels,
            "count": sum(int(s.count.sum()) for s in observed),
            "dtype": layer.dtype,
            "encoding": "ordered-bfloat16-midpoint" if layer.dtype == "float32" else f"ordered-{layer.dtype}",
            "kind": layer.point.kind,
        }
    )
    _add_scale(group, "channel", np.arange(observed[0].channels))
    per_channel: dict[str, np.ndarray] = {
        "channel_min": np.stack([s.minimum for s in observed]),
        "channel_max": np.stack([s.maximum for s in observed]),
        "channel_mean": np.stack([s.mean for s in observed]).astype(np.float32),
        "channel_std": np.stack([s.std for s in observed]).astype(np.float32),
        "channel_count": np.stack([s.count for s in observed]),
    }
    for field, values in per_channel.items():
        dataset = _compressed(group, field, values)
        dataset.dims[0].attach_scale(file["step_index"])
        dataset.dims[1].attach_scale(group["channel"])
    offsets = np.cumsum([0, *(len(s.histogram.keys) for s in observed)])
    _compressed(group, "histogram_keys", np.concatenate([s.histogram.keys for s in observed]))
    _compressed(group, "histogram_counts", np.concatenate([s.histogram.counts for s in observed]))
    group["histogram_offsets"] = offsets
    for field in ("nan", "inf"):
        group[f"{field}_count"] = np.asarray([getattr(s, field) for s in observed], np.uint64)
        group[f"{field}_count"].dims[0].attach_scale(file["step_index"])
    return group


_PER_STEP = ("channel_min", "channel_max", "channel_mean", "channel_std", "channel_count", "nan_count", "inf_count")


def _address(group: h5py.Group) -> int:
    return int(h5py.h5o.get_info(group["channel_min"].id).addr)


class ActivationFile:
    """Reads an ``activations.h5``; use as a context.

    Attributes:
        steps: the step indices collected, ascending.
        layers: the layers' names.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise CalibError(f"{path}: no such file; calib collect writes it")
        self.path = path
        with self._reading():
            self._file = h5py.File(path, "r")
        try:
            with self._reading():
                self.attributes: dict[str, Any] = dict(self._file.attrs)
                if (self.attributes.get("format"), self.attributes.get("format_version")) != (FORMAT, FORMAT_VERSION):
                    raise CalibError(f"{path}: not a {FORMAT} file of version {FORMAT_VERSION}")
                self.steps: list[int] = self._file["step_index"][:].tolist()
                self.layers: list[str] = list(self._file["layers"])
                self._first_with: dict[int, str] = {}
                for name in self.layers:
                    self._first_with.setdefault(_address(self._file["layers"][name]), name)
        except CalibError:
            self._file.close()
            raise

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever a damaged file makes h5py raise becomes one line that names the file."""
        try:
            yield
        except (OSError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CalibError(f"{self.path}: damaged or not an {FILE} ({reason}); run calib collect again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def evaluated_steps(self) -> list[int]:
        """The steps that the sampler feeds to the model while drawing: all but the finished latent."""
        with self._reading():
            flags = self._file["evaluated_by_sampler"][:]
        return [step for step, flag in zip(self.steps, flags, strict=True) if flag]

    def kind(self, layer: str) -> str:
        """What the layer reads: modulated, post-gelu, … or block."""
        with self._reading():
            return str(self._group(layer).attrs["kind"])

    def weight_sqnr(self, layer: str) -> dict[int, float]:
        """SQNR, dB, of the layer's weights at each bit-width; empty where they cannot be quantized."""
        with self._reading():
            group = self._group(layer)
            if "weight_sqnr" not in group:
                return {}
            bits, values = self._file["weight_bits"][:].tolist(), group["weight_sqnr"][:].tolist()
        return dict(zip(bits, values, strict=True))

    def by_step(self, layer: str) -> dict[int, Statistics]:
        """Statistics of one layer at each collected step; every dataset is read once."""
        with self._reading():
            group = self._group(layer)
            data = {name: group[name][:] for name in _PER_STEP}
            keys, counts = group["histogram_keys"][:], group["histogram_counts"][:]
            offsets, dtype = group["histogram_offsets"][:], str(group.attrs["dtype"])
        found = {}
        for row, step in enumerate(self.steps):
            part = slice(offsets[row], offsets[row + 1])
            count = data["channel_count"][row]
            found[step] = Statistics(
                minimum=data["channel_min"][row],
                maximum=data["channel_max"][row],
                count=count,
                mean=data["channel_mean"][row].astype(np.float64),
                m2=data["channel_std"][row].astype(np.float64) ** 2 * count,
                histogram=Histogram(dtype, keys[part], counts[part]),
                nan=int(data["nan_count"][row]),
                inf=int(data["inf_count"][row]),
            )
        return found

    def statistics(self, layer: str, steps: Sequence[int] | None = None) -> Statistics:
        """Statistics of one layer merged over ``steps`` (all where None)."""
        by_step = self.by_step(layer)
        for step in steps or ():
            if step not in by_step:
                raise CalibError(f"{self.path}: step {step} was not collected; it has {self.steps}")
        return merge_all([by_step[step] for step in (self.steps if steps is None else steps)])

    def same_data(self, layer: str) -> str:
        """The first layer whose statistics are this one's: layers that read one array share their datasets."""
        return self._first_with[_address(self._group(layer))]

    def _group(self, layer: str) -> h5py.Group:
        if layer not in self.layers:
            raise CalibError(f"{self.path}: no layer {layer!r}")
        return self._file["layers"][layer]
