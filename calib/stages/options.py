"""Options of the configuration's groups: functions named by ``_target_``, tried before anything is drawn.

For calib's own options and those of the user alike, parameters are checked against the function's signature, and its
result against the expected type.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from calib.analysis.heuristic import Heuristic, check_signature
from calib.analysis.ranges import Observed, RangeRule, StepRanges
from calib.base.errors import ConfigError
from calib.base.values import at_least, bind_target, check, group, target_of
from calib.dataset import subsets, timesteps
from calib.dataset.prompts import report_duplicates
from calib.dataset.settings import SamplerSettings
from calib.models.architecture import Architecture, check_architecture
from calib.models.model import DiffusionModel
from calib.quantization.quantizer import Quantized, Quantizer, QuantizerInput
from calib.stages.settings import ImageChooser, ModelChoice

import mlx.core as mx
import numpy as np

#: Key of a ``model`` option that names a function building its transformer without weights, so that layer patterns
#: (and the sampler's settings) are checked before anything is loaded. An option may leave it out.
SKELETON = "skeleton"


def _must_return(key: str, target: Any, what: str, found: object) -> ConfigError:
    return ConfigError.bad_value(key, target, f"must return {what}; returned {type(found).__name__}")


def _is_several(found: object) -> bool:
    return isinstance(found, Iterable) and not isinstance(found, str)


def model_choice(node: Any, sampler: SamplerSettings) -> ModelChoice:
    """The model, with functions that load it and that build its transformer without weights."""
    node = group("model", node)
    parameters = {name: value for name, value in node.items() if name != SKELETON}
    load = bind_target("model", parameters, given=("shift", "image_size"))

    def loaded() -> DiffusionModel:
        model = load(shift=sampler.shift, image_size=sampler.image_size)
        if not isinstance(model, DiffusionModel):
            raise _must_return("model._target_", node["_target_"], "a DiffusionModel", model)
        check_architecture(model.architecture, f"model._target_={node['_target_']}")
        return model

    name = check("model.name", node.get("name"), str)
    if SKELETON not in node:
        return ModelChoice(name, loaded, None)
    build = bind_target("model", {**parameters, "_target_": node[SKELETON]}, given=("image_size", "cfg_weight"))

    @cache
    def skeleton() -> Architecture:
        architecture: Architecture = build(image_size=sampler.image_size, cfg_weight=sampler.cfg_weight)
        check_architecture(architecture, f"model.{SKELETON}={node[SKELETON]}")
        return architecture

    return ModelChoice(name, loaded, skeleton)


def prompts_of(node: Any) -> tuple[str, ...]:
    """The prompts, at least one."""
    node = group("prompts", node)
    found = bind_target("prompts", node)()
    prompts = tuple(found) if _is_several(found) else (found,)
    if not _is_several(found) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _must_return("prompts._target_", node["_target_"], "a list of texts", found)
    if not prompts:
        raise ConfigError("prompts: the list of prompts is empty; give at least one")
    report_duplicates(prompts)
    return prompts


def schedule_of(node: Any, num_steps: int) -> tuple[int, ...] | timesteps.DriftSchedule:
    """The steps to collect, or the rule by which statistics choose them."""
    node = group(timesteps.GROUP, node)
    steps = bind_target(timesteps.GROUP, node, given=("num_steps",))(num_steps=num_steps)
    if isinstance(steps, timesteps.DriftSchedule):
        return steps
    if not _is_several(steps):
        raise _must_return(f"{timesteps.GROUP}._target_", node["_target_"], "step indices, 0 to num_steps", steps)
    return timesteps.checked(list(steps), num_steps)


def chooser_of(node: Any, checked_later: bool) -> ImageChooser:
    """The function that chooses images for collection; a choice by latents needs ``latents``."""
    node = dict(group(subsets.GROUP, node))
    requested = check("subset.num_images", node.pop("num_images", None), int | None)
    if requested is not None and not checked_later:
        at_least("subset.num_images", requested, 1)
    choose = bind_target(subsets.GROUP, node, given=("image_ids", "num_images"), optional=(subsets.LATENTS,))
    by_latents = subsets.LATENTS in inspect.signature(choose).parameters

    def chosen(image_ids: Sequence[int], latents: subsets.Latents | None) -> list[int]:
        count = subsets.resolve_count(requested, len(image_ids))
        if by_latents and latents is None:
            return list(image_ids[:count])  # placeholders: the choice needs drawn images
        more = {subsets.LATENTS: latents} if by_latents else {}
        returned = choose(image_ids=image_ids, num_images=count, **more)
        found = [int(i) for i in returned] if _is_several(returned) else []
        if not found or len(set(found)) < len(found) or not set(found) <= set(image_ids):
            raise _must_return("subset._target_", node["_target_"], "ids of those given, each once", returned)
        return found

    return chosen


def heuristic_of(node: Any) -> Heuristic:
    """The heuristic; one over single layers is tried on a made-up layer."""
    node = group("analysis", node)
    named = f"analysis._target_={node.get('_target_')}"
    check_signature(target_of("analysis", node), named)
    return Heuristic.of(bind_target("analysis", node, optional=Heuristic.GIVEN), named)


def ranges_of(node: Any) -> RangeRule:
    """The rule for ranges that vary with the step, tried on five steps."""
    node = group("ranges", node)
    rule = bind_target("ranges", node, given=("observed",))
    levels = np.linspace(1, 0.1, 5)
    ranges = rule(Observed(np.arange(5), -levels, levels, levels, levels))
    if not isinstance(ranges, StepRanges):
        raise ConfigError.bad_value("ranges._target_", node["_target_"], "must return StepRanges")
    return rule


def quantizer_of(node: Any, model: ModelChoice) -> Quantizer:
    """The quantizer, tried without layers, so that it checks its parameters."""
    node = group("quantizer", node)
    quantizer: Callable[[QuantizerInput], Quantized] = bind_target("quantizer", node, given=("work",))
    if model.skeleton is not None:
        found = quantizer(QuantizerInput.without_layers(model.skeleton(), mx.float16))
        if not isinstance(found, Quantized):
            raise _must_return("quantizer._target_", node["_target_"], "a Quantized", found)
    return quantizer
