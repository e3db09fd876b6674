"""Z-Image's transformer as mflux has it, as an :class:`~calib.models.architecture.Architecture`.

Two refiners prepare the picture's tokens, two the text's, then blocks run over both in one array.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.parts import InParts, Names
from calib.models.mflux.zimage.forward import KEY, padded, parts_of

import mlx.core as mx
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer

#: Layers of a block in the order in which they run; the text's refiners have no adaLN.
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


NAMES = Names(
    blocks={
        "noise_refiner": ("noise_refiner", WITHIN_BLOCK),
        "context_refiner": ("context_refiner", WITHIN_BLOCK),
        "unified_block": ("layers", WITHIN_BLOCK),
    },
    before={
        "x_embedder": f"all_x_embedder.{KEY}",
        "t_embedder.0": "t_embedder.linear1",
        "t_embedder.2": "t_embedder.linear2",
        "cap_embedder": "cap_embedder.1",
    },
    after={
        "final_layer.adaln": f"all_final_layer.{KEY}.adaLN_modulation.0",
        "final_layer.linear": f"all_final_layer.{KEY}.linear",
    },
    kinds={
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
    },
)


class ZImageArchitecture(InParts):
    """mflux's ``ZImageTransformer``, ``module``; resumable and divisible.

    Args:
        about: the arguments that ``module`` was made with.
    """

    input_layer = "x_embedder"

    def __init__(self, module: ZImageTransformer, about: Mapping[str, Any]):
        super().__init__(module, NAMES)
        self._about = dict(about)
        self.width, self.heads = int(module.dim), int(module.n_heads)

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        return parts_of(self.module, text, timestep, shape)

    def shared_input(self, name: str) -> str:
        """q for k and v, w1 for w3; the first adaLN for all but the last, which reads a SiLU of the embedding."""
        if name.endswith(".adaln") and name not in NAMES.after:
            return "noise_refiner_0.adaln"
        return re.sub(r"attn\.[kv]_proj$", "attn.q_proj", re.sub(r"mlp\.w3$", "mlp.w1", name))

    def kind(self, name: str) -> str:
        found = super().kind(name)
        return "normalized" if found == "modulated" and name.startswith("context_refiner") else found

    def tokens(self, latent_size: Sequence[int]) -> int:
        return padded(latent_size[0] * latent_size[1] // self.module.patch_size**2)

    def text_widths(self) -> tuple[int, None]:
        return int(self.module.cap_embedder[1].weight.shape[1]), None

    def describe(self) -> dict[str, Any]:
        return {"z_image": self._about}
