"""Z-Image's transformer as mflux has it, as an :class:`~calib.models.architecture.Architecture`.

Two refiners prepare the picture's tokens, two the text's, then blocks run over both in one array. The layers and blocks
are mflux's; the way between them (``zimage_forward``) is written for a batch, where mflux takes one picture.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.zimage_forward import KEY, padded, parts_of

import mlx.core as mx
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer
from mlx import nn

#: Blocks in the order in which they run: their canonical names, and where mflux has them.
BLOCKS = (("noise_refiner", "noise_refiner"), ("context_refiner", "context_refiner"), ("unified_block", "layers"))
#: Layers of a block in the order in which they run.
WITHIN_BLOCK = {
    "adaln": "adaLN_modulation.0",
    "attn.q_proj": "attention.to_q",
    "attn.k_proj": "attention.to_k",
    "attn.v_proj": "attention.to_v",
    "attn.o_proj": "attention.to_out.0",
    "mlp.w1": "feed_forward.w1",
    "mlp.w3": "feed_forward.w3",
    "mlp.w2": "feed_forward.w2",
}
#: Layers before the blocks, and after them.
BEFORE = {
    "x_embedder": f"all_x_embedder.{KEY}",
    "t_embedder.0": "t_embedder.linear1",
    "t_embedder.2": "t_embedder.linear2",
    "cap_embedder": "cap_embedder.1",
}
AFTER = {
    "final_layer.adaln": f"all_final_layer.{KEY}.adaLN_modulation.0",
    "final_layer.linear": f"all_final_layer.{KEY}.linear",
}
#: Kind of a layer's input, by the end of its name.
KINDS = {
    "final_layer.adaln": "post-silu",
    "t_embedder.2": "post-silu",
    "q_proj": "modulated",
    "k_proj": "modulated",
    "v_proj": "modulated",
    "w1": "modulated",
    "w3": "modulated",
    "final_layer.linear": "modulated",
    "o_proj": "post-attention",
    "w2": "post-swiglu",
}


class ZImageArchitecture:
    """mflux's ``ZImageTransformer``, ``module``; resumable and divisible.

    Args:
        about: the arguments that ``module`` was made with.
    """

    input_layer = "x_embedder"

    def __init__(self, module: ZImageTransformer, about: Mapping[str, Any]):
        self.module, self._about = module, dict(about)
        self.depth = tuple(len(getattr(module, place)) for _, place in BLOCKS)
        self.width, self.heads = int(module.dim), int(module.n_heads)
        self._keep: tuple[int, Callable[[Any], None]] | None = None

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        return self._run(-1, [x], x, text, timestep)

    def velocity_after(
        self, block: int, output: list[mx.array], x: mx.array, text: Conditioning, timestep: mx.array
    ) -> mx.array:
        return self._run(block + 1, output, x, text, timestep)

    def _run(self, done: int, passed: list[mx.array], x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The output by the parts after number ``done``, which passed on ``passed``."""
        parts = self.parts(text, timestep, x.shape)
        for number, part in enumerate(parts[done + 1 :], done + 1):
            passed = part(passed)
            if self._keep is not None and number == self._keep[0] + 1:
                self._keep[1](passed)
        return passed[0]

    @contextmanager
    def keeping(self, block: int, keep: Callable[[Any], None]) -> Iterator[None]:
        self._keep = (block, keep)
        try:
            yield
        finally:
            self._keep = None

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        return parts_of(self.module, text, timestep, shape)

    def layers(self) -> dict[str, nn.Module]:
        within = [f"{block}.{layer}" for block in self.blocks() for layer in WITHIN_BLOCK]
        modules = dict(self.module.named_modules())
        paths = {name: self.path(name) for name in (*BEFORE, *within, *AFTER)}
        # The text's refiners have no adaLN.
        return {name: modules[path] for name, path in paths.items() if path in modules}

    def path(self, name: str) -> str:
        if name in BEFORE or name in AFTER:
            return (BEFORE | AFTER)[name]
        block, _, layer = name.partition(".")
        stem, _, index = block.rpartition("_")
        place = f"{dict(BLOCKS).get(stem, stem)}.{index}"
        return f"{place}.{WITHIN_BLOCK.get(layer, layer)}" if layer else place

    def blocks(self) -> list[str]:
        return [f"{stem}_{i}" for (stem, _), count in zip(BLOCKS, self.depth, strict=True) for i in range(count)]

    def streams(self, block: str) -> tuple[str, ...]:
        return ()

    def block_of(self, name: str) -> int | None:
        if name in BEFORE:
            return None
        block = name.partition(".")[0]
        return sum(self.depth) if name in AFTER else self.blocks().index(block)

    def shared_input(self, name: str) -> str:
        """q for k and v, w1 for w3; the first adaLN for all but the last, which reads a SiLU of the embedding."""
        if name.endswith(".adaln") and name not in AFTER:
            return "noise_refiner_0.adaln"
        return re.sub(r"attn\.[kv]_proj$", "attn.q_proj", re.sub(r"mlp\.w3$", "mlp.w1", name))

    def kind(self, name: str) -> str:
        found = next((kind for end, kind in KINDS.items() if name.endswith(end)), "embedding")
        return "normalized" if found == "modulated" and name.startswith("context_refiner") else found

    def tokens(self, latent_size: Sequence[int]) -> int:
        return padded(latent_size[0] * latent_size[1] // self.module.patch_size**2)

    def text_widths(self) -> tuple[int, None]:
        return int(self.module.cap_embedder[1].weight.shape[1]), None

    def describe(self) -> dict[str, Any]:
        return {"z_image": self._about}
