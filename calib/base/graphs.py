"""What MLX would run on a Mac: the graphs of all that is computed in a context, caught on any machine.

MLX computes nothing before a value is needed. In the context everything that needs one (``mx.eval``, ``np.array(x)``,
``x.item()`` …) first shows the graph behind it to MLX's own export, which lists its operations. Code meets what it
would meet on a Mac: a default device that is a GPU of Apple's. Operations run on a CPU stream all the same, of a thread
of its own: another thread cannot compute what is on it, so nothing is computed unseen. Where ``mx.cpu`` is asked for
expressly they are on a second one, and excused from having a Metal kernel.
"""

import struct
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import current_thread
from typing import Any

from calib.base.metal import DECIDING, QUANTIZED, Operation, kernels, lacking

import mlx.core as mx
import numpy as np

#: What needs the values of the arrays among its arguments.
COMPUTING: Mapping[Any, Sequence[str]] = {
    mx: ("eval", "async_eval", "save", "savez", "savez_compressed", "save_safetensors", "save_gguf"),
    mx.array: ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__", "__repr__", "__str__"),
    np: ("array", "asarray", "ascontiguousarray", "stack", "concatenate"),
}
#: Functions with operations of their own on a GPU, which are made of others on a CPU.
FAST = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "rope": "RoPE",
    "scaled_dot_product_attention": "ScaledDotProductAttention",
}

_compute, _load = mx.eval, mx.load


class Graphs:
    """The kinds of operations in all graphs so far, and those that Metal lacks.

    Attributes:
        lacking: by kind and reason, where the first was computed: file and line.
    """

    def __init__(self, cpu: mx.Stream):
        self.operations: set[Operation] = set()
        self.lacking: dict[str, str] = {}
        self._cpu, self._kernels = str(cpu), kernels()
        self._reasons: dict[Operation, str] = {}

    def add(self, arrays: Sequence[mx.array]) -> None:
        """Add the graph of ``arrays``, as far as it is not computed yet."""
        try:
            found = _exported(arrays)
        except ValueError as error:  # some operations cannot be exported: what is behind them would go unseen
            self._report(str(error))
            return
        self.operations.update(found)
        if wrong := [(number, why) for number, operation in enumerate(found) if (why := self._reason(operation))]:
            streams = _streams(arrays, [operation.name for operation in found])
            for number, why in wrong:
                if streams[number] != self._cpu:
                    self._report(f"{found[number]}: {why}")

    def call(self, operation: Operation, stream: Any) -> None:
        """Add an operation that is not in the graphs of a CPU, asked for on ``stream``."""
        self.operations.add(operation)
        if why := self._reason(operation):
            beside = mx.negative(mx.array(1.0), stream=stream)
            if _streams([beside], ["Negative"]) != [self._cpu]:
                self._report(f"{operation}: {why}")

    def _reason(self, operation: Operation) -> str:
        if operation not in self._reasons:
            self._reasons[operation] = lacking(operation, self._kernels)
        return self._reasons[operation]

    def _report(self, what: str) -> None:
        callers = (frame for frame in reversed(traceback.extract_stack()) if frame.filename != __file__)
        frame = next(callers)
        self.lacking.setdefault(what, f"{frame.filename}:{frame.lineno}")


@contextmanager
def watched() -> Iterator[Graphs]:
    """Catch the graphs of all that is computed in the context; models must be made in it, and end with it.

    What is left uncomputed in it cannot be computed afterwards. ``mx.compile`` is off: it would hide what it fuses.
    """
    random: Any = mx.random.state
    _compute(list(random))  # what is uncomputed before cannot be computed there
    with ExitStack() as stack:
        worker = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="calib-graphs"))
        default, cpu = (worker.submit(mx.new_stream, mx.cpu).result() for _ in range(2))
        graphs, run = Graphs(cpu), partial(_run, worker)
        mx.disable_compile()
        stack.callback(mx.enable_compile)
        stack.enter_context(mx.stream(default))
        stack.callback(lambda: run(_end, list(random)))
        for owner, name, replacement in [
            *((where, what, _watched(where, what, graphs, run)) for where in COMPUTING for what in COMPUTING[where]),
            *((mx.fast, name, _fast(name, graphs)) for name in FAST),
            (mx, "dequantize", _dequantize(graphs, run)),
            (mx, "contiguous", _contiguous(graphs, run)),
            (mx, "load", lambda *a, **k: run(_loaded, *a, **k)),
            *_of_a_mac(default, cpu),
        ]:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield graphs


def _of_a_mac(default: mx.Stream, cpu: mx.Stream) -> list[tuple[Any, str, Any]]:
    """What MLX answers on a Mac where it is asked about the machine."""
    known = {**mx.device_info(), "max_recommended_working_set_size": mx.get_memory_limit()}
    return [
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx, "default_stream", lambda device=None: cpu if device is cpu else default),
        (mx, "device_info", lambda device=None: known),
        (mx, "cpu", cpu),
        (mx, "new_stream", lambda device: cpu if device is cpu else default),
        (mx.metal, "is_available", lambda: True),
        (mx.cuda, "is_available", lambda: False),
    ]


def _run(worker: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """The result of a call in the thread whose streams everything is on."""
    if current_thread().name.startswith("calib-graphs"):
        return function(*arguments, **keywords)
    return worker.submit(function, *arguments, **keywords).result()


def _watched(owner: Any, name: str, graphs: Graphs, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that adds the graphs of the arrays among its arguments before it computes them."""
    function = getattr(owner, name)

    @wraps(function)
    def watching(*arguments: Any, **keywords: Any) -> Any:
        if arrays := list(_arrays([arguments, keywords])):
            graphs.add(arrays)
            return run(function, *arguments, **keywords)
        return function(*arguments, **keywords)

    return watching


def _fast(name: str, graphs: Graphs) -> Callable[..., mx.array]:
    """A function of ``mx.fast`` that adds the operation which it is on a GPU."""
    function = getattr(mx.fast, name)

    @wraps(function)
    def recording(*arguments: Any, stream: Any = None, **keywords: Any) -> mx.array:
        result: mx.array = function(*arguments, stream=stream, **keywords)
        inputs = _types(_arrays([arguments, keywords]))
        graphs.call(Operation(FAST[name], inputs, _types([result])), stream)
        return result

    return recording


def _dequantize(graphs: Graphs, run: Callable[..., Any]) -> Callable[..., mx.array]:
    """``mx.dequantize``, which adds what it is on a GPU, and is computed at once: on a CPU it is 50 operations."""
    function = mx.dequantize

    @wraps(function)
    def recording(
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        group_size: int = 64,
        bits: int = 4,
        mode: str = "affine",
        stream: Any = None,
        **more: Any,
    ) -> mx.array:
        inputs = list(_arrays([w, scales, biases]))
        graphs.add(inputs)
        result: mx.array = function(w, scales, biases, group_size, bits, mode, stream=stream, **more)
        arguments = (group_size, bits, QUANTIZED.index(mode), True)
        graphs.call(Operation("Quantize", _types(inputs), _types([result]), arguments), stream)
        run(_compute, result)
        return result

    return recording


def _contiguous(graphs: Graphs, run: Callable[..., Any]) -> Callable[..., mx.array]:
    """``mx.contiguous``, computed at once: MLX's export does not know it."""
    function = mx.contiguous

    @wraps(function)
    def recording(a: mx.array, *arguments: Any, stream: Any = None) -> mx.array:
        graphs.add([a])
        graphs.call(Operation("Contiguous", _types([a]), _types([a])), stream)
        result = function(a, *arguments, stream=stream)
        run(_compute, result)
        return result

    return recording


def _end(arrays: Any) -> None:
    """Compute what outlives the context, and end the thread's streams, which may else outlive the process."""
    _compute(arrays)
    mx.clear_streams()


def _loaded(*arguments: Any, **keywords: Any) -> Any:
    """What a file holds, read at once: MLX reads files on the CPU everywhere."""
    found = _load(*arguments, **keywords)
    _compute(found)
    return found


def _arrays(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, dict):
        yield from _arrays(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _arrays(branch)


def _exported(arrays: Sequence[mx.array]) -> list[Operation]:
    """The operations behind ``arrays``, inputs first; ValueError where MLX cannot export one."""
    found: list[Operation] = []

    def listen(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            name = event["name"]
            inputs, outputs = (tuple([_name(dtype) for *_, dtype in event[key]]) for key in ("inputs", "outputs"))
            found.append(Operation(name, inputs, outputs, tuple(event["arguments"][: DECIDING.get(name, 0)])))

    mx.export_function(listen, lambda: list(arrays))
    return found


def _types(arrays: Iterable[mx.array]) -> tuple[str, ...]:
    return tuple(_name(array.dtype) for array in arrays)


@cache
def _name(dtype: mx.Dtype) -> str:
    name = str(dtype).rpartition(".")[2]
    return "bool_" if name == "bool" else name


def _streams(arrays: Sequence[mx.array], names: Sequence[str]) -> list[str]:
    """The streams of the operations behind ``arrays``, of these ``names``, as MLX prints streams.

    The list that MLX exports lacks them. The file that it exports has, in the same order, before the name of each
    operation its length, and before that the number of its stream, the device's kind and number, 32 bits each.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.mlxfn"
        mx.export_function(str(path), lambda: list(arrays))
        content = path.read_bytes()
    found, place = [], 0
    for name in names:
        written = struct.pack("<Q", len(name)) + name.encode()
        place = content.index(written, place)
        stream, kind, device = struct.unpack_from("<3i", content, place - 12)
        found.append(f"Stream(Device({('cpu', 'gpu')[kind]}, {device}), {stream})")
        place += len(written)
    return found
