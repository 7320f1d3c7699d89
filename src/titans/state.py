"""States: immutable trees of tensors with one row per stream, and everything that can be done to any of them.

A state is a frozen dataclass derived from `State`. Its fields are tensors whose first dimension is the batch, states,
tuples of these, or None; what is neither (a chunk size, say) is named in ``static``. int64 tensors are counts, one per
row, kept on the CPU: 0 marks a fresh row, and no call ever waits for an accelerator to learn where its streams stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T", bound="State")
KINDS: dict[str, type[State]] = {}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of 8 bits torch can only store
MOST_ROWS = 2**20  # of a batch; a larger number is a mistake, which would take minutes to run out of memory


@dataclass(frozen=True)
class State:
    """Base of every state.

    Attributes:
        static: names of the fields that are no part of the tree.
        columns: the dimension along which tensors of this class (and of states inside it) hold a row's past,
            right-aligned, so that rows of different lengths differ in nothing but empty columns on the left; None
            where there is none.
    """

    static: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        """Every kind of state registers itself: for files by name, and with torch's pytree."""
        known = KINDS.setdefault(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"the state {cls.__name__!r} of {known.__module__} has this name: choose another")
        KINDS[cls.__name__] = cls  # the newer one, where a module is loaded again
        pytree.register_pytree_node(
            cls, _flatten, lambda values, context: _unflatten(cls, values, context),
            flatten_with_keys_fn=_flatten_with_keys,
        )  # fmt: skip

    def map(self: T, change: Callable[[Tensor], Tensor]) -> T:
        """The same state with ``change`` applied to every tensor that is no count."""
        return walk(lambda leaf, x: x if _is_count(x) else change(x), self)

    def detach(self: T) -> T:
        """Cut the state off the graph: truncated back-propagation starts here."""
        return self.map(Tensor.detach)

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Move or cast every tensor, as ``Tensor.to``; counts stay what and where they are.

        Raises:
            ValueError: a dtype that is not floating point, or of 8 bits.
        """
        for value in (*args, *kwargs.values()):
            value = value.dtype if isinstance(value, Tensor) else value
            if isinstance(value, torch.dtype) and value not in FLOATS:
                raise ValueError(f"a state must be of a floating-point dtype of 16 to 64 bits, got {value}")
        return self.map(lambda x: x.to(*args, **kwargs))

    def select(self: T, rows: Sequence[int] | Tensor) -> T:
        """Keep these rows of the batch, in this order; a row may be repeated.

        Raises:
            ValueError: a row outside the batch, or a bool mask instead of row numbers.
        """
        index = torch.tensor(_row_numbers(rows, self.rows), dtype=torch.long)
        return walk(lambda leaf, x: x.index_select(0, index.to(x.device)), self)

    def fork(self: T, copies: int) -> T:
        """Every row ``copies`` ≥ 1 times, the copies of a row side by side: several ways to go on from one place.

        Raises:
            ValueError: more than 2^20 rows, or no such number.
        """
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise ValueError(f"copies must be an integer of at least 1, got {copies!r}")
        if copies * self.rows > MOST_ROWS:
            raise ValueError(f"copies of {self.rows} rows must make at most {MOST_ROWS:,}, got {copies:,} of each")
        return self.select([row for row in range(self.rows) for _ in range(copies)])

    def reset(self: T, rows: Sequence[int] | Tensor) -> T:
        """Mark these rows fresh: at the next call they start a new stream, as if nothing had been read.

        Raises:
            ValueError: a row outside the batch, or a bool mask instead of row numbers.
        """
        index = torch.tensor(_row_numbers(rows, self.rows), dtype=torch.long)
        return walk(lambda leaf, x: x.index_fill(0, index, 0) if _is_count(x) else x, self)

    def put(self: T, rows: Sequence[int] | Tensor, new: State) -> T:
        """The same state with its ``rows`` taken from ``new``, whose row i becomes ``rows[i]``, wherever it stands.

        Raises:
            ValueError: a row outside the batch, another number of rows in ``new``, or a state of another kind or
                shape; the message names the part.
        """
        numbers = _row_numbers(rows, self.rows)
        if not isinstance(new, State) or new.rows != len(numbers):
            raise ValueError(
                f"put needs a state of {len(numbers)} rows, got {getattr(new, 'rows', type(new).__name__)}"
            )
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"rows must differ from each other, got {numbers}")
        index = torch.tensor(numbers, dtype=torch.long)

        def put(leaf: Leaf, old: Tensor, taken: Tensor) -> Tensor:
            old, taken = leaf.align(old, taken)
            return old.index_copy(0, index.to(old.device), taken.to(old))

        return walk(put, self, new)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        found: list[int] = []
        walk(lambda leaf, x: found.append(x.shape[0]) or x, self)
        return max(found, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors, counts left out."""
        sizes: list[int] = []
        self.map(lambda x: sizes.append(x.numel() * x.element_size()) or x)
        return sum(sizes)


@dataclass(frozen=True)
class Leaf:
    """Where a tensor lies in its state: a path such as ``state.layers[0].memory.weights[1]``, and its columns."""

    path: str
    columns: int | None = None

    def align(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors of one place in several states, empty columns added on the left where one has more.

        Raises:
            ValueError: they differ in more than that.
        """
        dim = self.columns
        shapes = [list(x.shape[1:]) for x in tensors]
        if dim is not None and dim < tensors[0].dim():
            width = max(x.shape[dim] for x in tensors)
            tensors = tuple(_widen(x, dim, width) for x in tensors)
        if len({x.shape[1:] for x in tensors}) > 1:
            raise ValueError(f"{self.path}: the states' shapes differ, {' and '.join(map(str, shapes))} per row")
        return list(tensors)


def walk(change: Callable[..., Any], first: Any, *others: Any, path: str = "state", columns: int | None = None) -> Any:
    """The one recursion over states: ``first`` with every tensor x replaced by ``change(leaf, x, ...)``.

    Args:
        change: called with the `Leaf` and the tensors at this place of all trees.
        first, others: trees of the same kind.
        path: how messages call the trees.
        columns: see `State`.

    Raises:
        ValueError: the trees differ in kind; the message carries the path.
    """
    for other in others:
        if type(other) is not type(first) and not (isinstance(first, Tensor) and isinstance(other, Tensor)):
            raise ValueError(f"{path}: one state has {_kind(first)} there, the other {_kind(other)}")
    if isinstance(first, Tensor):
        return change(Leaf(path, columns), first, *others)
    if isinstance(first, tuple):
        if any(len(other) != len(first) for other in others):
            raise ValueError(f"{path}: the states have {' and '.join(str(len(t)) for t in (first, *others))} parts")
        parts = enumerate(zip(first, *others, strict=True))
        return tuple(walk(change, *part, path=f"{path}[{i}]", columns=columns) for i, part in parts)
    if not isinstance(first, State):
        return first
    inside = first.columns if first.columns is not None else columns
    fields = {}
    for field in dataclasses.fields(first):
        values = [getattr(tree, field.name) for tree in (first, *others)]
        if field.name in first.static:
            if field.compare and any(value != values[0] for value in values):
                raise ValueError(f"{path}.{field.name}: the states differ, {' and '.join(map(str, values))}")
            fields[field.name] = values[0]
        else:
            fields[field.name] = walk(change, *values, path=f"{path}.{field.name}", columns=inside)
    return type(first)(**fields)


def counts(values: Sequence[int]) -> Tensor:
    """A count per row, as states hold them."""
    made = torch.tensor(values, dtype=torch.int64)
    if not torch.compiler.is_dynamo_compiling():
        made.known = tuple(values)  # type: ignore[attr-defined]  so that `numbers` need not look into an exported graph
    return made


def numbers(count: Tensor) -> tuple[int, ...]:
    """A count's values."""
    known: tuple[int, ...] | None = getattr(count, "known", None)
    return tuple(count.tolist()) if known is None else known


def check_place(state: Any, device: torch.device, what: str, path: str = "state") -> None:
    """Raise a ValueError that names the first tensor of ``state``, counts left out, which lies on another device than
    ``what``, the part of a model that reads it."""

    def check(leaf: Leaf, x: Tensor) -> Tensor:
        if not _is_count(x) and x.device != device:
            raise ValueError(f"{leaf.path} is on {x.device}, {what} on {device}: move it there with state.to(...)")
        return x

    walk(check, state, path=path)


def check_rows(state: State) -> None:
    """Raise a ValueError that names the first tensor which is no part of a sound state: its number of rows is not that
    of the others, it is a count below 0, or it is neither a count nor one of `FLOATS`."""

    def check(leaf: Leaf, x: Tensor) -> Tensor:
        if x.dim() < 1 or x.shape[0] != rows:
            raise ValueError(f"{leaf.path} must have the state's {rows} rows, got {list(x.shape)}")
        if _is_count(x) and (x.dim() != 1 or bool((x < 0).any())):
            raise ValueError(f"{leaf.path} must be counts of at least 0, one per row, got {x.tolist()}")
        if not _is_count(x) and x.dtype not in FLOATS:
            raise ValueError(f"{leaf.path} must be floating point, got {x.dtype}")
        return x

    rows = state.rows
    walk(check, state)


def encode(tree: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """A tree as plain values for JSON, its tensors moved into ``tensors`` under their paths."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(tree, tuple):
        return [encode(item, tensors, f"{path}[{i}]") for i, item in enumerate(tree)]
    if isinstance(tree, State):
        values = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
        return {"kind": type(tree).__name__, "fields": {n: encode(v, tensors, f"{path}.{n}") for n, v in values}}
    return tree


def decode(tree: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Undo `encode`; every tensor is a copy of its own.

    Raises:
        ValueError: an unknown kind, or a part that is missing; the message carries the path.
    """
    if isinstance(tree, list):
        return tuple(decode(item, tensors, f"{path}[{i}]") for i, item in enumerate(tree))
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        if tree["tensor"] not in tensors:
            raise ValueError(f"{path}: its tensor is missing")
        return tensors[tree["tensor"]].clone()
    kind, fields = KINDS.get(tree.get("kind", "")), tree.get("fields")
    if kind is None or not isinstance(fields, dict) or set(fields) != {f.name for f in dataclasses.fields(kind)}:
        raise ValueError(f"{path}: {tree.get('kind')!r} is no kind of state, or one of another version")
    return kind(**{name: decode(item, tensors, f"{path}.{name}") for name, item in fields.items()})


def _is_count(x: Tensor) -> bool:
    return x.dtype == torch.int64


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _widen(x: Tensor, dim: int, width: int) -> Tensor:
    missing = width - x.shape[dim]
    return x if not missing else torch.cat((x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :]), x), dim)


def _row_numbers(rows: Sequence[int] | Tensor, batch: int) -> list[int]:
    if not isinstance(rows, Tensor | Sequence) or isinstance(rows, str):
        raise ValueError(f"rows must be a list of row numbers, got {rows!r}")
    try:
        index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).flatten()
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ValueError(f"rows must be a list of row numbers, got {rows!r}") from None
    if index.numel() and (index.is_floating_point() or index.dtype in (torch.bool, torch.uint8)):  # flags, both
        raise ValueError(f"rows must be row numbers, got {index.dtype}")
    if not isinstance(rows, Tensor) and any(isinstance(row, bool) for row in rows):
        raise ValueError(f"rows must be row numbers, got {rows!r}")
    for row in index.tolist():
        if not 0 <= row < batch:
            raise ValueError(f"rows must lie in 0..{batch - 1}, got {row}")
    return [int(row) for row in index.tolist()]


def _names(kind: type[State]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.name not in kind.static]


def _flatten(state: State) -> tuple[list[Any], Any]:
    return [getattr(state, name) for name in _names(type(state))], tuple(getattr(state, n) for n in state.static)


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flatten(state)
    return [(pytree.GetAttrKey(n), v) for n, v in zip(_names(type(state)), values, strict=True)], context


def _unflatten(kind: type[State], values: Any, context: Any) -> State:
    return kind(**dict(zip(_names(kind), values, strict=True)), **dict(zip(kind.static, context, strict=True)))
