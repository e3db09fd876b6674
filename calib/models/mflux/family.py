"""A family of mflux's models: what its options have in common, and how they are loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calib.base.errors import ConfigError
from calib.models.architecture import Architecture
from calib.models.memory import preflight
from calib.models.mflux import note_version
from calib.models.mflux.decoder import Decoder
from calib.models.mflux.files import (
    component_of,
    component_weights,
    folder_of,
    known_folder,
    load_component,
    sizes,
    tokenizer_of,
)
from calib.models.mflux.flow import MfluxFlow
from calib.models.mflux.precision import check_dtype
from calib.models.mflux.text import TextEncoder, without_constants
from calib.models.model import DiffusionModel, Guidance, ModelDtype, guided
from calib.models.placed import placed

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mlx import nn

#: A picture's height and width are multiples of this.
MULTIPLE = 16
#: Parts of names of tensors of the other components that mflux does not read.
UNUSED = ("rotary_emb.", "lm_head.", "visual.", "num_batches_tracked")


@dataclass(frozen=True)
class Family:
    """What mflux has for a model, and what differs between its models.

    Attributes:
        command: mflux's that draws with a folder of the model.
        definition: mflux's weight definition; config: its settings of the sampler; scheduler: its name of that.
        architecture: makes the transformer without weights, by sizes under mflux's names.
        sizes, text_sizes: what ``config.json`` calls the sizes of transformer and text encoder: mflux's names by those.
        encoder: makes the text encoder without weights; encode, padded, dropped: as :class:`TextEncoder` has them.
        encoder_dtype: the one type in which mflux runs it; None: the transformer's.
        text_encoders: their names, of which the conditioning depends.
        vae: makes the VAE without weights; unpacked: as :class:`Decoder` has it.
        decoding_bytes: of a VAE, image size and type: what drawing a picture takes.
        in_strips: whether the VAE draws in strips.
        latent: pixels of a side of a latent's place, and its channels.
        noise, noise_kind: as :class:`MfluxFlow` has them.
        times: what the transformer takes for levels, where activations are of a type.
        guidance: how it is combined; None where it is distilled.
        activations: the one type in which mflux computes them; None: that of the weights.
    """

    command: str
    definition: Any
    config: ModelConfig
    scheduler: str
    architecture: Callable[[dict[str, Any]], Architecture]
    sizes: Mapping[str, str]
    text_sizes: Mapping[str, str]
    encoder: Callable[..., nn.Module]
    encode: Callable[[str, LanguageTokenizer, nn.Module], mx.array]
    text_encoders: str
    vae: Callable[[], nn.Module]
    unpacked: Callable[[nn.Module, mx.array], mx.array]
    decoding_bytes: Callable[[nn.Module, Sequence[int], mx.Dtype], int]
    latent: tuple[int, int]
    noise: Callable[[int, int, int], mx.array]
    times: Callable[[mx.array, mx.Dtype], mx.array]
    noise_kind: str = "mlx"
    padded: bool = False
    dropped: int = 0
    encoder_dtype: mx.Dtype | None = None
    in_strips: bool = True
    guidance: Guidance | None = None
    activations: mx.Dtype | None = None

    def skeleton(
        self,
        name: str,
        repository: str,
        checkpoint: str | None = None,
        dtype: ModelDtype = ModelDtype.BFLOAT16,
        shift: float = 1.0,
        image_size: Sequence[int] = (1024, 1024),
        cfg_weight: float = 0.0,
        stream: bool | None = None,
    ) -> Architecture:
        """Check the parameters of :meth:`load`, and build the transformer without weights."""
        check_dtype(dtype)
        if shift != 1:
            allowed = f"{name} takes only 1: mflux shifts by the picture's size"
            raise ConfigError.bad_value("sampler.shift", shift, allowed)
        if any(side % MULTIPLE for side in image_size):
            allowed = f"must be [height, width], each a multiple of {MULTIPLE}"
            raise ConfigError.bad_value("sampler.image_size", list(image_size), allowed)
        if cfg_weight > 0 and self.guidance is None:
            allowed = f"{name} takes only 0, its guidance is distilled"
            raise ConfigError.bad_value("sampler.cfg_weight", cfg_weight, allowed)
        return self.architecture(
            sizes(known_folder(repository, checkpoint, self.definition), "transformer", self.sizes)
        )

    def load(
        self,
        name: str,
        repository: str,
        checkpoint: str | None = None,
        dtype: ModelDtype = ModelDtype.BFLOAT16,
        shift: float = 1.0,
        image_size: Sequence[int] = (1024, 1024),
        stream: bool | None = None,
    ) -> DiffusionModel:
        """Load the model, from the hub or from a folder in its layout or as mflux saves it.

        Args:
            shift: mflux's alone, by size: must be 1.
            image_size: height and width, pixels.
            stream: read the transformer's weights in each forward; None: where they do not fit into memory.
        """
        note_version()
        preflight(name, self.skeleton(name, repository, checkpoint, dtype, shift, image_size).module, dtype, stream)
        folder = folder_of(repository, checkpoint, self.definition)
        text = self.text(folder, dtype.mlx)
        architecture = self.architecture(sizes(folder, "transformer", self.sizes))
        # mflux counts blocks itself, but needs to be told of Z-Image's, which it calls layers.
        layers = len(module.layers) if hasattr(module := architecture.module, "layers") else None
        component = component_of(self.definition, "transformer", num_layers=layers)
        read = partial(component_weights, folder, component, dtype.mlx)
        read()  # what is wrong with the transformer is said first
        vae = self.vae()
        vae.pop("encoder", None)
        load_component(vae, folder, component_of(self.definition, "vae"), dtype.mlx, ("encoder.", *UNUSED))
        model = self.model(name, architecture, vae, text, dtype.mlx, image_size)
        return placed(model, read, str(folder / component.hf_subdir), stream, dtype=dtype.mlx)

    def components(self, folder: Path) -> dict[str, nn.Module]:
        """The components beside the transformer, without weights, of the sizes that ``folder`` states."""
        return {
            "vae": self.vae(),
            "text_encoder": self.encoder(**sizes(folder, "text_encoder", self.text_sizes)),
        }

    def text(self, folder: Path, dtype: mx.Dtype) -> TextEncoder:
        """The text encoder of a folder; its weights are read at first use."""
        tokenizer = tokenizer_of(self.definition, folder)
        assert isinstance(tokenizer, LanguageTokenizer)
        skeleton = partial(self.encoder, **sizes(folder, "text_encoder", self.text_sizes))
        dtype = self.encoder_dtype or dtype

        def loaded() -> nn.Module:
            module = skeleton()
            layers = len((module.encoder if hasattr(module, "encoder") else module).layers)
            component = component_of(self.definition, "text_encoder", num_layers=layers)
            with without_constants(module):
                load_component(module, folder, component, dtype, UNUSED)
            return module

        return TextEncoder(tokenizer, skeleton, loaded, self.encode, dtype, self.padded, self.dropped)

    def flow(self, image_size: Sequence[int], dtype: mx.Dtype) -> MfluxFlow:
        """The sampler, for weights of ``dtype``."""
        dtype = self.activations or dtype
        own = (self.noise, self.noise_kind, lambda levels: self.times(levels, dtype))
        return MfluxFlow(self.config, self.scheduler, *own, image_size, dtype)

    def model(
        self,
        name: str,
        architecture: Architecture,
        vae: nn.Module,
        text: Any,
        dtype: mx.Dtype,
        image_size: Sequence[int],
    ) -> DiffusionModel:
        """The model of these parts, whose weights are of ``dtype``, for pictures of one size."""
        decoder, computed = Decoder(vae, partial(self.unpacked, vae)), self.activations or dtype
        side, channels = self.latent
        return DiffusionModel(
            name=name,
            architecture=architecture,
            sampler=self.flow(image_size, dtype),
            encode_text=text,
            decoder=decoder,
            decode_latents=decoder,
            draw_latents=decoder.draw if self.in_strips else None,
            dtype=computed,
            latent_shape=(image_size[0] // side, image_size[1] // side, channels),
            text_length=text.length,
            token_count=text.count,
            max_prompt_tokens=text.length,
            text_encoders=self.text_encoders,
            supports_guidance=self.guidance is not None,
            guidance=self.guidance or guided,
            unload_text=text.unload,
            text_bytes=text.nbytes,
            decoding_bytes=self.decoding_bytes(vae, image_size, computed),
        )
