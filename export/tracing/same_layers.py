"""Which layers of a model are the same program, so that one of each kind is traced and the others are copies of it.

The model runs once on tensors without data. Every operator that a layer calls is written down, with its arguments:
what the layer was given by its place, parameters by their names in the layer, what it computed itself by its number,
and all else by its identity or value. Two layers whose records are equal differ in nothing but their parameters, and
in the number of the layer that placeholder operators carry.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from satchel.export.tracing.torch_ops import DOMAIN

FEWEST = 3
"""Fewer layers are not compared: tracing them takes no longer."""

SMALL = 4096
"""Elements of the largest constant that is compared by value."""

MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError, ArithmeticError)
"""What the code of a model raises on tensors without data."""

LAYER = "layer"
"""The argument of placeholder operators that counts the layers."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers that are the same program.

    Attributes:
        first: The name of the module that is traced.
        offsets: For the others by name, what is added to the numbers of layers in it.
    """

    first: str
    offsets: Mapping[str, int]


def same_layers(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Kind]:
    """Find the layers of a model that are the same program.

    Args:
        module: The model. Its parameters may be on the meta device.
        inputs: What it is called with; the values are not read.

    Returns:
        The kinds of more than one layer. A layer is of none if it runs twice or not at all, reads no earlier tokens,
        shares a parameter with another, changes what it is given, gives others more than its result, or gives no
        tensor like its first.
    """
    layers = dict(_listed(module, ""))
    if len(layers) < FEWEST:
        return []
    recorder = _Recorder(layers)
    hooks = [hook for name, layer in layers.items() for hook in recorder.watch(name, layer)]
    try:
        with _compiling_state_context(), FakeTensorMode(allow_non_fake_inputs=True), recorder, torch.no_grad():
            module(*inputs)
    except MODEL_ERRORS:
        return []  # every layer is traced, and the tracer says what is wrong with the model
    finally:
        for hook in hooks:
            hook.remove()
    kinds: dict[Hashable, list[tuple[str, int]]] = {}
    for name, call in recorder.calls.items():
        if call.alone is None:
            kinds.setdefault(tuple(call.entries), []).append((name, call.number or 0))
    return [
        Kind(same[0][0], {name: number - same[0][1] for name, number in same[1:]})
        for same in kinds.values()
        if len(same) > 1
    ]


def _listed(module: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The items of lists of modules, but for those inside of others."""
    for name, part in module.named_children():
        place = f"{prefix}{name}"
        if isinstance(part, torch.nn.ModuleList):
            yield from ((f"{place}.{item}", layer) for item, layer in part.named_children())
        else:
            yield from _listed(part, f"{place}.")


class _Call:
    """What a layer did, and why it is like no other (`alone`)."""

    def __init__(self, layer: torch.nn.Module, shared: set[int], leaves: list[Any]) -> None:
        tensors = {**dict(layer.named_parameters(remove_duplicate=False)), **dict(layer.named_buffers())}
        self.own = {id(tensor): name for name, tensor in tensors.items()}
        self.given: dict[int, int] = {}
        self.made: dict[int, int] = {}
        self.entries: list[Hashable] = [(name, tensor.shape, tensor.dtype) for name, tensor in sorted(tensors.items())]
        self.first = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        self.number: int | None = None
        self.alone: str | None = "it shares a parameter" if shared & set(self.own) else None
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                self.given.setdefault(id(leaf), place)
                self.entries.append((place, leaf.shape, leaf.dtype))

    def add(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write an operator down."""
        arguments = operator._schema.arguments
        named = dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
        written = {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}
        if any(id(leaf) not in self.made for name in written & set(named) for leaf in _tensors(named[name])):
            self.alone = "it changes a tensor that it did not make"
        entry: list[Hashable] = [str(operator)]
        for name, value in named.items():
            if name == LAYER and operator.namespace == DOMAIN:
                self.number = value if self.number is None else self.number
                entry.append(value - self.number)
            else:
                several = isinstance(value, list | tuple)
                entry.append((name, several, tuple(self._encoded(leaf) for leaf in tree_leaves(value))))
        self.entries.append(tuple(entry))

    def finish(self, result: Any) -> None:
        """Write down what the layer gives."""
        found, first = _tensors(result), self.first
        if len(found) != 1 or first is None or (found[0].shape, found[0].dtype) != (first.shape, first.dtype):
            self.alone = "it gives no tensor like its first"
            return
        if self.number is None or id(found[0]) not in self.made:
            self.alone = "it is no layer of a decoder: it reads no earlier tokens"
        self.entries.append(tuple(self._encoded(leaf) for leaf in tree_leaves(result)))

    def _encoded(self, leaf: Any) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        for kind, names in (("made", self.made), ("given", self.given)):
            if id(leaf) in names:
                return kind, names[id(leaf)]
        if id(leaf) in self.own:
            return "own", self.own[id(leaf)]
        if not isinstance(leaf, FakeTensor) and leaf.device.type != "meta" and leaf.numel() <= SMALL:
            return str(leaf.dtype), tuple(leaf.shape), tuple(leaf.flatten().tolist())
        return "outside", id(leaf)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, layers: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, _Call] = {}
        self._now: _Call | None = None
        self._makers: dict[int, _Call] = {}
        self._kept: list[Any] = []  # an id is of one object as long as that lives
        owners = Counter(
            number
            for layer in layers.values()
            for number in {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        )
        self._shared = {number for number, count in owners.items() if count > 1}

    def watch(self, name: str, layer: torch.nn.Module) -> Iterator[Any]:
        """Yield the hooks with which the calls of a layer are recorded."""

        def enter(layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
            leaves = tree_leaves((args, kwargs))
            self._kept.append(leaves)
            again = name in self.calls
            self._now = self.calls[name] = _Call(layer, self._shared, leaves)
            if again:
                self._now.alone = "it runs twice"

        def leave(layer: torch.nn.Module, args: Any, result: Any) -> None:
            call, self._now = self._now, None
            if call is not None:
                call.finish(result)
                for tensor in _tensors(result):
                    self._makers.pop(id(tensor), None)

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield layer.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":  # it asks for the device of a tensor
            return result
        self._kept.append((args, kwargs, result))
        for tensor in _tensors((args, kwargs)):
            maker = self._makers.get(id(tensor))
            if maker is not None and maker is not self._now:
                maker.alone = "others read what it computed on the way"
        if self._now is not None:
            self._now.add(func, args, kwargs)
            for tensor in _tensors(result):
                self._now.made.setdefault(id(tensor), len(self._now.made))
                self._makers[id(tensor)] = self._now
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
