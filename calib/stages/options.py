"""Options of the configuration's groups: functions named by ``_target_``, tried before anything is drawn.

For calib's own options and those of the user alike, parameters are checked against the function's signature, and what
it returns against what it must. Lists, tuples, ranges, generators and arrays of several values are the same.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

from calib.analysis import heuristic
from calib.analysis.heuristic import Heuristic, check_signature
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.analysis.rules import checked_rule
from calib.base.errors import ConfigError
from calib.base.option import Option, Unfit, in_short, is_of_calib, kind_of, on_trial, several, whole_number
from calib.base.targets import bind_target, target_of
from calib.base.values import at_least, check, group
from calib.dataset import prompt_files, subsets, timesteps
from calib.dataset.prompt_rows import COLUMN
from calib.dataset.prompts import from_file, report_duplicates
from calib.dataset.settings import SamplerSettings
from calib.models.architecture import Architecture, Divisible, check_architecture
from calib.models.memory import device_memory
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.quantization.check import checked_quantizer
from calib.quantization.quantizer import Quantized, Quantizer, QuantizerInput
from calib.stages.settings import ImageChooser, ModelChoice

import mlx.core as mx
import numpy as np

#: Key of a ``model`` option that names a function building its transformer without weights, so that layer patterns
#: (and the sampler's settings) are checked before anything is loaded. An option may leave it out.
SKELETON = "skeleton"
#: Key of a ``model`` option that says whether its weights are streamed, which no result depends on.
STREAM = "stream"


def _named(key: str, node: Mapping[str, Any]) -> str:
    return f"{key}._target_={node.get('_target_')}"


def model_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the model that results depend on: of calib's own all but whether its weights are streamed."""
    return {k: v for k, v in node.items() if k != STREAM or not str(node.get("_target_")).startswith("calib.")}


def model_choice(node: Any, sampler: SamplerSettings) -> ModelChoice:
    """The model, with functions that load it and that build its transformer without weights."""
    node = group("model", node)
    # Left to the function's default, a loader of the user's own need not have it.
    default = {STREAM} if node.get(STREAM) is None else set[str]()
    parameters = {name: value for name, value in node.items() if name not in {SKELETON, *default}}
    given = ("shift", "image_size")
    function = bind_target("model", parameters, given, returns=(DiffusionModel,))
    named = _named("model", node)
    model = Option(named, function, given, "a DiffusionModel", partial(_loaded, named=named))
    load = partial(model, sampler.shift, sampler.image_size)
    name = check("model.name", node.get("name"), str)
    if SKELETON not in node:
        return ModelChoice(name, load, None)
    named, given = f"model.{SKELETON}={node[SKELETON]}", ("image_size", "cfg_weight")
    build = bind_target("model", {**parameters, "_target_": node[SKELETON]}, given, ("shift",))
    if "shift" in inspect.signature(build).parameters:
        build = partial(build, shift=sampler.shift)
    skeleton = Option(named, build, given, "an Architecture", partial(_architecture, named=named))
    made = cache(partial(skeleton, sampler.image_size, sampler.cfg_weight))
    return ModelChoice(name, load, made, partial(_is_streamed, node, made))


def _is_streamed(node: Mapping[str, Any], skeleton: Callable[[], Architecture]) -> bool:
    """Whether the weights alone, in the type that is asked for, exceed the memory, or streaming is asked for."""
    if node.get("stream") is not None or "stream" not in node or "dtype" not in node:
        return node.get("stream") is True
    size = ModelDtype(node["dtype"]).mlx.size * sum(w.size for w in weights(skeleton().module).values())
    return size > device_memory() and isinstance(skeleton(), Divisible)


def _loaded(found: Any, named: str, **_: Any) -> DiffusionModel:
    if not isinstance(found, DiffusionModel):
        raise Unfit(f"returned {kind_of(found)}")
    _architecture(found.architecture, named)
    shape = tuple(whole_number(size, "its latent_shape holds ") for size in several(found.latent_shape))
    if len(shape) != 3 or min(shape) < 1:
        raise Unfit(f"its latent_shape is {shape}, not (height, width, channels)")
    if not isinstance(found.dtype, mx.Dtype):
        raise Unfit(f"its dtype is {in_short(found.dtype)}, none of MLX's")
    found.latent_shape = shape
    return found


def _architecture(found: Any, named: str, **_: Any) -> Architecture:
    check_architecture(found, named)
    architecture: Architecture = found
    return architecture


def prompts_of(node: Any) -> tuple[str, ...]:
    """The prompts, at least one."""
    node = group("prompts", node)
    function = bind_target("prompts", node, returns=(Iterable,))
    prompts = Option(_named("prompts", node), function, (), "a list of texts", _texts)()
    report_duplicates(prompts)
    return prompts


def categories_of(node: Any, by: str | None) -> tuple[str, ...] | None:
    """What the column ``by`` has for each of the prompts, which must be of a file; None without a column."""
    if by is None:
        return None
    node = group("prompts", node)
    if target_of("prompts", node) is not from_file:
        allowed = "is a column of a file of prompts, as prompts=file prompts.path=FILE names one; these have no columns"
        raise ConfigError.bad_value("evaluation.by", by, allowed)
    return tuple(prompt_files.categories(node.get("path", ""), node.get("column", COLUMN), by))


def _texts(found: Any) -> tuple[str, ...]:
    if isinstance(found, set | frozenset):
        raise Unfit(f"returned a {kind_of(found)}, which has no order")
    texts = several(found)
    if not texts:
        raise Unfit("returned none")
    if other := [text for text in texts if not isinstance(text, str)]:
        raise Unfit(f"returned {in_short(other[0])} in a {kind_of(found)}")
    return tuple(map(str, texts))


def schedule_of(node: Any, num_steps: int) -> tuple[int, ...] | timesteps.DriftSchedule:
    """The steps to collect, or the rule by which statistics choose them."""
    node, given = group(timesteps.GROUP, node), ("num_steps",)
    function = bind_target(timesteps.GROUP, node, given, returns=(Iterable, timesteps.DriftSchedule))
    must = f"step indices, 0 to {num_steps} (sampler.num_steps)"
    return Option(_named(timesteps.GROUP, node), function, given, must, _steps)(num_steps)


def _steps(found: Any, num_steps: int) -> tuple[int, ...] | timesteps.DriftSchedule:
    if isinstance(found, timesteps.DriftSchedule):
        return found
    steps = sorted({whole_number(step, "returned ") for step in several(found)})
    if not steps:
        raise Unfit("returned none")
    if strange := [step for step in steps if not 0 <= step <= num_steps]:
        raise Unfit(f"returned {strange[0]}")
    return tuple(steps)


def chooser_of(node: Any, checked_later: bool) -> ImageChooser:
    """The function that chooses images for collection; a choice by latents needs ``latents``."""
    node = dict(group(subsets.GROUP, node))
    requested = check("subset.num_images", node.pop("num_images", None), int | None)
    if requested is not None and not checked_later:
        at_least("subset.num_images", requested, 1)
    given = ("image_ids", "num_images")
    function = bind_target(subsets.GROUP, node, given, (subsets.LATENTS,), returns=(Iterable,))
    choose = Option(_named(subsets.GROUP, node), function, given, "ids of those given, each once", _ids)
    by_latents = subsets.LATENTS in inspect.signature(function).parameters

    def chosen(image_ids: Sequence[int], latents: subsets.Latents | None) -> list[int]:
        ids, count = list(image_ids), subsets.resolve_count(requested, len(image_ids))
        if not by_latents:
            return choose(ids, count)
        if latents is not None:
            return choose(ids, count, latents=latents)
        if not is_of_calib(function.func):
            with on_trial():
                choose(ids, count, latents=subsets.made_up_latents)
        return ids[:count]  # placeholders: this choice needs drawn images

    return chosen


def _ids(found: Any, image_ids: Sequence[int], **_: Any) -> list[int]:
    ids, known = [whole_number(i, "returned ") for i in several(found)], set(image_ids)
    if not ids:
        raise Unfit("returned none")
    if strange := [i for i in ids if i not in known]:
        raise Unfit(f"returned {strange[0]}, which is none of them")
    if len(set(ids)) < len(ids):
        raise Unfit(f"returned {Counter(ids).most_common(1)[0][0]} more than once")
    return ids


def heuristic_of(node: Any) -> Heuristic:
    """The heuristic; one over single layers is tried on a made-up layer."""
    node = group("analysis", node)
    named = _named("analysis", node)
    check_signature(target_of("analysis", node), named)
    return Heuristic.of(bind_target("analysis", node, optional=heuristic.GIVEN), named)


def ranges_of(node: Any, steps: Sequence[int] | timesteps.DriftSchedule, num_steps: int, collects: bool) -> RangeRule:
    """The rule for ranges that vary with the step, tried on ``steps``, the very ones if this job ``collects`` them."""
    node = group("ranges", node)
    rule = checked_rule(bind_target("ranges", node, ("observed",), returns=(StepRanges,)), _named("ranges", node))
    if isinstance(steps, timesteps.DriftSchedule):
        steps, collects = range(num_steps), False
    levels, seen = np.linspace(1, 0.1, num_steps), np.array([s for s in steps if s < num_steps] or [0])
    with nullcontext() if collects else on_trial():
        rule(Observed(seen, -levels[seen], levels[seen], levels[seen], levels))
    return rule


def quantizer_of(node: Any, model: ModelChoice) -> Quantizer:
    """The quantizer, tried without layers, so that it checks its parameters."""
    node = group("quantizer", node)
    function = bind_target("quantizer", node, ("work",), returns=(Quantized, Mapping))
    quantizer = checked_quantizer(function, _named("quantizer", node))
    if model.skeleton is not None:
        quantizer(QuantizerInput.without_layers(model.skeleton(), mx.float16))
    return quantizer
