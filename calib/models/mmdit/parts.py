"""Run a DiffusionKit MMDiT in parts: the embeddings, one block after the other, the final layer.

From part to part pass the streams and, last, the embedding of text and timestep, of which every block makes its own
modulation. What precedes and what follows the blocks is as in DiffusionKit's own forward pass: each layer is called
once, in the part that it belongs to.
"""

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.architecture import Conditioning, Part
from calib.models.mmdit.modulation import KEY, TIMESTEP, embedding_of, modulating, timesteps_of

import mlx.core as mx
from diffusionkit.mlx.mmdit import MMDiT, MultiModalTransformerBlock, UnifiedTransformerBlock, unpatchify


def parts_of(module: MMDiT, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
    """The forward pass for x of ``shape`` in parts; see :class:`calib.models.architecture.Divisible`."""
    pooled, config, length = text.pooled, module.config, text.tokens.shape[1]
    assert pooled is not None
    times = timesteps_of(timestep, shape[0])
    patches = (shape[1] // config.patch_size, shape[2] // config.patch_size)
    unified = list(module.unified_transformer_blocks) if config.depth_unified else []

    def places() -> mx.array | None:
        """FLUX's encoding of places; SD3 adds its own to the first stream."""
        return module.pre_sdpa_rope(text_sequence_length=length, latent_image_resolution=patches) if unified else None

    def first(given: list[mx.array]) -> list[mx.array]:
        x = given[0]
        image, words = module.x_embedder(x), module.context_embedder(text.tokens[:, :, None, :])
        if "x_pos_embedder" in module:
            image = image + module.x_pos_embedder(x)
        return [image.reshape(shape[0], -1, 1, config.hidden_size), words, embedding_of(module, pooled, times)]

    def multimodal(block: MultiModalTransformerBlock) -> Part:
        def run(given: list[mx.array]) -> list[mx.array]:
            *streams, embedding = given
            with modulating([block.image_transformer_block, block.text_transformer_block], embedding, KEY):
                streams = block(*streams, TIMESTEP, positional_encodings=places())
            return [*(stream for stream in streams if stream is not None), embedding]

        return run

    def joint(block: UnifiedTransformerBlock) -> Part:
        def run(given: list[mx.array]) -> list[mx.array]:
            *streams, embedding = given
            hidden = streams[0] if len(streams) == 1 else mx.concatenate(streams[::-1], axis=1)  # text first
            with modulating([block.transformer_block], embedding, KEY):
                return [block(hidden, TIMESTEP, positional_encodings=places()), embedding]

        return run

    blocks = [multimodal(block) for block in module.multimodal_transformer_blocks] + [joint(b) for b in unified]

    def last(given: list[mx.array]) -> list[mx.array]:
        hidden, embedding = given
        with modulating([module.final_layer], embedding, KEY):
            v = module.final_layer(hidden[:, length:] if unified else hidden, TIMESTEP)
        if config.patchify_via_reshape:
            return [module.x_embedder.unpack(v, shape[1:3])]
        return [unpatchify(v, config.patch_size, *shape[1:3], config.vae_latent_dim)]

    return [first, *blocks, last]
