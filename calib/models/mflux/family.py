"""A family of mflux's models: what its options have in common, and how they are loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from calib.base.errors import ConfigError
from calib.base.values import AtLeast, AtMost
from calib.models.architecture import Architecture
from calib.models.memory import preflight
from calib.models.mflux import note_version
from calib.models.mflux.decoder import Decoder
from calib.models.mflux.files import (
    component_for,
    component_of,
    component_weights,
    folder_of,
    known_folder,
    load_component,
    sizes,
    tokenizers_of,
)
from calib.models.mflux.flow import MfluxFlow
from calib.models.mflux.precision import check_dtype
from calib.models.mflux.text import Encode, Encoder, TextEncoder, without_constants
from calib.models.model import DiffusionModel, Guidance, ModelDtype, guided
from calib.models.placed import placed

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mlx import nn

#: A picture's height and width are multiples of this.
MULTIPLE = 16
#: Parts of names of tensors of the other components that mflux does not read.
UNUSED = ("rotary_emb.", "lm_head.", "visual.", "num_batches_tracked", "position_ids")
#: A weight of guidance that a user may ask for, of a transformer that is told one; None: mflux's own.
Told = Annotated[float, AtLeast(0), AtMost(1000)] | None


@dataclass(frozen=True)
class Family:
    """What mflux has for a model, and what differs between its models.

    Attributes:
        command: mflux's that draws with a folder of the model.
        definition: mflux's weight definition; config: its settings of the sampler; scheduler: its name of that.
        architecture: makes the transformer without weights, by sizes under mflux's names.
        sizes: what ``config.json`` calls the transformer's sizes: mflux's names by those.
        encoders: text encoders, by mflux's name for them; encode, padded, dropped: as :class:`TextEncoder` has them.
        encoder_dtype: the one type in which mflux runs them; None: the transformer's.
        of_length: mflux's name for the tokenizer whose texts are as long as ``config`` says; empty: none.
        text_encoders: names of all on which the conditioning depends.
        vae: makes the VAE without weights; unpacked: as :class:`Decoder` has it.
        decoding_bytes: of a VAE, image size and type: what drawing a picture takes.
        in_strips: whether the VAE draws in strips.
        latent: pixels of a side of a latent's place, and its channels.
        noise, noise_kind: as :class:`MfluxFlow` has them.
        times: what the transformer takes for levels, where weights are of a type.
        guidance: how it is combined; None where it is distilled.
        told: makes the family of a weight of guidance that is an input of the transformer, and of a type of weights;
            None where there is no such input.
        activations: the one type in which mflux computes them; None: that of the weights.
    """

    command: str
    definition: Any
    config: ModelConfig
    scheduler: str
    architecture: Callable[[dict[str, Any]], Architecture]
    sizes: Mapping[str, str]
    encoders: Mapping[str, Encoder]
    encode: Encode
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
    of_length: str = ""
    in_strips: bool = True
    guidance: Guidance | None = None
    told: "Callable[[Family, Told, mx.Dtype], Family] | None" = None
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
        guidance: Told = None,
    ) -> Architecture:
        """Check the parameters of :meth:`load`, and build the transformer without weights."""
        check_dtype(dtype)
        if guidance is not None and self.told is None:
            raise ConfigError.bad_value(
                "model.guidance", guidance, f"the transformer of {name} is told none; leave it out"
            )
        if shift != 1:
            how = "shifts by the picture's size" if self.config.requires_sigma_shift else "does not shift"
            allowed = f"{name} takes only 1: mflux {how}"
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
        guidance: Told = None,
    ) -> DiffusionModel:
        """Load the model, from the hub or from a folder in its layout or as mflux saves it.

        Args:
            shift: mflux's alone, by size: must be 1.
            image_size: height and width, pixels.
            stream: read the transformer's weights in each forward; None: where they do not fit into memory.
            guidance: what the transformer is told of guidance, where it is: one forward a step, as without.
        """
        note_version()
        plain = self.skeleton(name, repository, checkpoint, dtype, shift, image_size, guidance=guidance)
        preflight(name, plain.module, dtype, stream)
        own = self if self.told is None else self.told(self, guidance, dtype.mlx)
        folder = folder_of(repository, checkpoint, self.definition)
        text = own.text(folder, dtype.mlx)
        architecture = own.architecture(sizes(folder, "transformer", self.sizes))
        component = component_for(self.definition, "transformer", architecture.module)
        read = partial(component_weights, folder, component, dtype.mlx)
        read()  # what is wrong with the transformer is said first
        vae = self.vae()
        vae.pop("encoder", None)
        load_component(vae, folder, component_of(self.definition, "vae"), dtype.mlx, ("encoder.", *UNUSED))
        model = own.model(name, architecture, vae, text, dtype.mlx, image_size)
        return placed(model, read, str(folder / component.hf_subdir), stream, dtype=dtype.mlx)

    def components(self, folder: Path) -> dict[str, nn.Module]:
        """The components beside the transformer, without weights, of the sizes that ``folder`` states."""
        return {"vae": self.vae()} | {name: self._encoder(name, folder) for name in self.encoders}

    def _encoder(self, name: str, folder: Path) -> nn.Module:
        """A text encoder without weights, of the sizes that ``folder`` states."""
        own = self.encoders[name]
        return own.make(**sizes(folder, component_of(self.definition, name).hf_subdir, own.sizes))

    def text(self, folder: Path, dtype: mx.Dtype) -> TextEncoder:
        """The text encoders of a folder; their weights are read at first use."""
        tokenizers = tokenizers_of(self.definition, folder, {self.of_length: self.config.max_sequence_length})
        dtype = self.encoder_dtype or dtype

        def skeletons() -> list[nn.Module]:
            return [self._encoder(name, folder) for name in self.encoders]

        def loaded() -> list[nn.Module]:
            modules = skeletons()
            for name, module in zip(self.encoders, modules, strict=True):
                with without_constants(module):
                    load_component(module, folder, component_for(self.definition, name, module), dtype, UNUSED)
            return modules

        return TextEncoder(tokenizers, skeletons, loaded, self.encode, dtype, self.padded, self.dropped)

    def flow(self, image_size: Sequence[int], dtype: mx.Dtype) -> MfluxFlow:
        """The sampler, for weights of ``dtype``."""
        own = (self.noise, self.noise_kind, lambda levels: self.times(levels, dtype))
        return MfluxFlow(self.config, self.scheduler, *own, image_size, self.activations or dtype)

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
        rounded = None if self.activations is None else dtype
        decoder, computed = Decoder(vae, partial(self.unpacked, vae), rounded), self.activations or dtype
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
