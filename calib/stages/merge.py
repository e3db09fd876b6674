"""Merge the run directories of a collection's shards; the command is in :mod:`calib.cli.files`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from calib.activations.merge import merge_shards
from calib.base.errors import CalibError, ConfigError, lacks_or_garbles
from calib.base.files import read_json, write_json
from calib.base.folders import check_new, new_folder
from calib.base.layout import ACTIVATIONS, METADATA
from calib.runs.exchange import settle
from calib.stages.collect import summarise

#: Numbers of NaN and infinite values that were left out of the statistics, by layer and step.
_NonFinite: TypeAlias = dict[str, dict[str, dict[str, int]]]


def merge(runs: Sequence[Path], into: Path) -> int:
    """Merge the run directories of all shards of a collection into the folder ``into``; returns the number of images.

    ``calib analyze stats=INTO`` and all other readers of run directories can read it.

    Raises:
        ConfigError: the directories are not all shards of one collection, or ``into`` is not empty.
        CalibError: a shard's files are missing or damaged.
    """
    for run in runs:
        settle(run)
        if not run.is_dir():
            raise ConfigError(f"{run}: no such run directory; calib collect with shard.index and shard.count makes one")
    check_new("--into", into)
    documents = sorted((_shard_metadata(run) for run in runs), key=lambda document: document["shard"]["index"])
    with new_folder(into) as made:
        blocks = merge_shards(runs, made)
        summarise(made)
        joined = {**documents[0], "image_ids": [i for block in blocks for i in block.images]}
        hashes = {i: h for d in documents for i, h in zip(d["image_ids"], d.get("image_hashes") or [], strict=False)}
        joined |= {"image_hashes": [hashes.get(i) for i in joined["image_ids"]]}
        joined |= {"shard": {"index": 0, "count": 1}, "merged_from": [str(run) for run in runs]}
        joined["non_finite"] = _joined_non_finite([document["non_finite"] for document in documents])
        joined["non_finite_output"] = sorted({step for document in documents for step in document["non_finite_output"]})
        write_json(made / METADATA, joined)
    return len(joined["image_ids"])


def _shard_metadata(run: Path) -> dict[str, Any]:
    """Read and check the collection's metadata in a shard's run directory."""
    if not (run / ACTIVATIONS).exists():
        raise CalibError(f"{run / ACTIVATIONS}: no such file; calib collect writes it")
    document = read_json(run / METADATA)
    try:
        int(document["shard"]["index"]), dict(document["non_finite"]), list(document["non_finite_output"])
    except (KeyError, TypeError, ValueError) as error:
        raise lacks_or_garbles(run / METADATA, error, "run the shard's calib collect again") from None
    found: dict[str, Any] = document
    return found


def _joined_non_finite(parts: Sequence[_NonFinite]) -> _NonFinite:
    """Sum the counts of NaN and infinity by layer and step."""
    total: _NonFinite = {}
    for part in parts:
        for layer, steps in part.items():
            for step, counts in steps.items():
                own = total.setdefault(layer, {}).setdefault(step, {"nan": 0, "inf": 0})
                total[layer][step] = {kind: own[kind] + counts[kind] for kind in own}
    return total
