"""A transformer larger than memory, streamed block by block from its checkpoint.

MLX reads an array of a file when it is first used. So the weights of a block are arrays that are not read yet; once the
block has run they are replaced by others, and their memory is free. What runs before the blocks and after them stays.
Nothing but the order of evaluation is another than without streaming: results are the same, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from calib.base.errors import CalibError, ConfigError
from calib.models.architecture import Architecture, Conditioning, Divisible, parent_of, part_of
from calib.models.parallel import reading, streams_of
from calib.models.tensors import fingerprint_of, set_weights

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

Layer = TypeVar("Layer", bound=nn.Module)

#: What is measured with less: by backward passes, a block at a time.
BY_GRADIENTS = "set sensitivity.method=gradient, or choose analysis=sqnr, mse, range or cv"
#: What quantizes without gradients.
INSTEAD_OF_TRAINING = "choose quantizer=gptq with quantizer.pictures=0, fit or rtn"
#: Blocks whose weights are in memory at once: while one computes the next is read.
AT_ONCE = 2


class Streamed:
    """An :class:`Architecture` whose forward passes are evaluated block by block.

    It has none of the optional abilities, as those hold more than a block. An input's summaries must be tied to the
    input (``mx.depends``): what is not evaluated with a block would keep its activations, or its weights, in memory.

    Args:
        inner: the transformer; divisible.
        first: its weights by path, none of them read yet.
        read: returns others of the same names and shapes; called when weights of a block are read again, once for all.
        dtype: of the weights that it runs with.
        source: the checkpoint, for errors.
    """

    def __init__(
        self,
        inner: Architecture,
        first: Mapping[str, mx.array],
        read: Callable[[], Mapping[str, mx.array]],
        dtype: mx.Dtype,
        source: str,
    ):
        assert isinstance(inner, Divisible)
        self.inner, self._parts, self._read, self._dtype, self._source = inner, inner.parts, read, dtype, source
        self._places = [_parameters(inner.module, inner.path(block)) for block in inner.blocks()]
        self._waiting: dict[str, mx.array] = {}
        self._change: Callable[[str, mx.array], mx.array] = lambda path, weight: weight
        self._unread: frozenset[str] = frozenset()
        self._shapes = {path: weight.shape for path, weight in first.items()}
        staying = self.staying(first)
        set_weights(inner.module, staying, dtype)
        self.release()
        sizes = [dtype.size * sum(first[path].size for path in places) for places in self._places]
        #: Bytes that a forward reads.
        self.bytes_read = sum(first[path].nbytes for places in self._places for path in places)
        #: Bytes of weights that stay, and that are in memory at most.
        self.nbytes_idle = dtype.size * sum(weight.size for weight in staying.values())
        self.nbytes = self.nbytes_idle + AT_ONCE * max(sizes)

    def __getattr__(self, key: str) -> Any:
        if key in vars(Architecture):
            return getattr(self.inner, key)
        raise AttributeError(key)

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The output, of which only what follows the blocks is yet to be computed."""
        return self.velocities(x, text, timestep, [slice(0, len(x))])[0]

    def velocities(
        self,
        x: mx.array,
        text: Conditioning,
        timestep: mx.array,
        parts: Sequence[slice],
        entering: Callable[[slice], None] = lambda part: None,
    ) -> list[mx.array]:
        """The outputs for ``parts`` of the rows, which go through each block side by side: it is read once.

        Args:
            entering: called before any operation of a part is built.
        """
        steps = [self._parts(text[part], of_rows(timestep, part), x[part].shape) for part in parts]
        passed, streams = [[x[part]] for part in parts], streams_of(len(parts))
        for place in range(len(self._places) + 2):
            for i, (part, stream) in enumerate(zip(parts, streams, strict=True)):
                with mx.stream(stream):
                    entering(part)
                    passed[i] = steps[i][place](passed[i])
            if place <= len(self._places):
                self.compute(passed, place)
                self.release(place - 1)
        return [own[0] for own in passed]

    def fresh(self) -> dict[str, mx.array]:
        """All weights by path, not read yet, apart from those that it runs with."""
        found = self._read()
        for path, shape in self._shapes.items():
            if path not in found or found[path].shape != shape:
                raise CalibError(f"{self._source}: was changed while it was read, first in {path}; run this again")
        return {path: found[path].astype(self._dtype) for path in self._shapes}

    def compute(self, arrays: list[list[mx.array]], following: int) -> None:
        """Evaluate ``arrays``, and meanwhile read the weights of block number ``following``, if there is one."""
        with self.reading():
            mx.async_eval(arrays)
            self.read_ahead(following)
            mx.eval(arrays)

    def read_ahead(self, block: int) -> None:
        """Begin to read the weights of block number ``block``, if there is one."""
        places = self._places[block].items() if 0 <= block < len(self._places) else ()
        mx.async_eval([module[key] for path, (module, key) in places if path not in self._unread])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Name the checkpoint where its weights cannot be read in the context."""
        try:
            yield
        except RuntimeError as error:
            if "[read]" not in str(error):
                raise
            raise self._unreadable() from None

    def _unreadable(self) -> CalibError:
        return CalibError(f"{self._source}: cannot be read to its end; download it again")

    def release(self, block: int | None = None) -> None:
        """Free the weights of a block, or of all; -1 is none."""
        chosen = self._places if block is None else self._places[block : block + 1] if block >= 0 else []
        for places in chosen:
            if not self._waiting.keys() >= places.keys():
                with reading():
                    self._waiting = self.fresh()
            for path, (module, key) in places.items():
                module[key] = self._change(path, self._waiting.pop(path))

    def staying(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Those of ``weights``, by path, that are not streamed."""
        return {path: weight for path, weight in weights.items() if not any(path in own for own in self._places)}

    @contextmanager
    def changed(self, change: Callable[[str, mx.array], mx.array]) -> Iterator[None]:
        """Have ``change(path, weight)`` in place of every weight that is streamed, in the context; lazy."""
        own, self._change = self._change, change
        self.release()
        try:
            yield
        finally:
            self._change = own
            self.release()

    @contextmanager
    def without(self, layers: Iterable[str]) -> Iterator[None]:
        """Do not read ahead the weights of ``layers``, in the context: others are in their places."""
        own = self._unread
        self._unread = own | {f"{self.inner.path(name)}.weight" for name in layers}
        try:
            yield
        finally:
            self._unread = own

    def in_turn(self, layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
        """``layers``, of which one is best used at a time: the weights of a block are freed when another's is taken."""
        return _InTurn(self, layers)

    def fingerprint(self) -> str:
        """Hash of all weights, as of a model that is not streamed."""

        def named() -> Iterator[tuple[str, mx.array]]:
            waiting = self.fresh()
            for name in sorted(waiting):
                yield name, waiting.pop(name)

        try:
            return fingerprint_of(named())
        except RuntimeError:
            raise self._unreadable() from None


class _InTurn(Mapping[str, Layer]):
    """Layers of a streamed transformer, by name."""

    def __init__(self, streamed: Streamed, layers: Mapping[str, Layer]):
        self._streamed, self._layers = streamed, layers
        self._taken: int | None = None

    def __getitem__(self, name: str) -> Layer:
        block = part_of(self._streamed.inner, name) - 1
        if self._taken not in (None, block):
            self._streamed.release(self._taken)
        self._taken = block
        return self._layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def _parameters(root: nn.Module, path: str) -> dict[str, tuple[nn.Module, str]]:
    """The modules and keys of all parameters of the module at ``path``, by the parameter's path."""
    parent, key = parent_of(root, path)
    found = {}
    for below in dict(tree_flatten(parent[key].parameters())):
        module, _ = parent_of(parent[key], below)
        found[f"{path}.{below}"] = (module, below.rpartition(".")[2])
    return found


def of_rows(timestep: mx.array, part: slice) -> mx.array:
    """The timesteps of the rows ``part``, where it is not one for all."""
    return timestep if timestep.size == 1 else timestep[part]


def refuse_streamed(architecture: Architecture, what: str, instead: str) -> None:
    """Raise where a transformer is streamed and ``what`` needs all of its weights at once."""
    if isinstance(architecture, Streamed):
        raise refusal(what, instead)


def refusal(what: str, instead: str) -> ConfigError:
    """The error for ``what`` needs all weights of a streamed model at once."""
    why = "need all weights in memory, and this model's are read in each forward (model.stream)"
    return ConfigError(f"{what} {why}; {instead}")
