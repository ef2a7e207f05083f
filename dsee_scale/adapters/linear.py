"""The adapted layer: the base layer itself, given a subclass in place, whose forward adds the delta.

    y = base(x) + s * ((x A^T) B^T + x S2^T)

Nothing is nested: the base weight keeps its name, `isinstance` keeps its answer, and ZeRO-3 fetches the
layer's tensors together, through one set of hooks. A, B and the values of S2 lie one after the other in one
parameter: under ZeRO-3 every trained parameter costs a gradient hook, a copy into the reduction's bucket and,
after each optimizer step, an all-gather, however small it is.

Shapes: O outputs, I inputs, R rank, N sparse entries, K slices, S outputs covered by the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.lowrank_sparse import Shapes, Update, add_update, split_shapes
from dsee_scale.adapters.sparse_residual import prepare
from dsee_scale.algorithms.delta import Delta
from dsee_scale.errors import TargetError

PARAMETER = "dsee_flat"
BUFFERS = ("dsee_rows", "dsee_cols")
ATTRIBUTES = (
    "dsee_rank",
    "dsee_slices",
    "dsee_scaling",
    "dsee_dropout",
    "dsee_sparse",
    "dsee_shape",
    "dsee_transposed",
)
A_STD = 0.02
"""Standard deviation of A's normal init. B is zero, so it sets only how fast B starts to move."""
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class AdaptedLayer(nn.Module):
    """Mixin in front of the base class of an adapted layer; `attach` makes instances, never a constructor.

    Attributes:
        dsee_flat: parameter (K*R*I + S*R + K*N,): A, B and values, see `split_flat`.
        dsee_A: (K*R, I), view of it; only where the parameter is whole.
        dsee_B: (S, R), view of it, the slices' rows one after the other.
        dsee_values: (K*N,), view of it, the entries of S2.
        dsee_rows: int32 buffer (K*N,), each entry's output index in the whole weight.
        dsee_cols: int32 buffer (K*N,), each entry's input index; entries are sorted by (slice, row, col).
        dsee_rank: R.
        dsee_slices: K output ranges (start, stop).
        dsee_scaling: s = alpha / rank.
        dsee_dropout: probability with which an element of the adapter's input is dropped in training.
        dsee_sparse: whether S2 is trained; without it its entries stay zero.
        dsee_shape: true (O, I) of the weight.
        dsee_transposed: whether the weight is stored I x O.
        dsee_base: the layer's own class.
        dsee_in_place: whether the update may be added into the base layer's output.
        dsee_update: the above, prepared for the products; derived, in no state dict.
    """

    dsee_base: type[nn.Module]
    dsee_flat: nn.Parameter
    dsee_rows: Tensor
    dsee_cols: Tensor
    dsee_rank: int
    dsee_slices: tuple[tuple[int, int], ...]
    dsee_scaling: float
    dsee_dropout: float
    dsee_sparse: bool
    dsee_shape: tuple[int, int]
    dsee_transposed: bool
    dsee_in_place: bool
    dsee_update: Update

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus delta.

        Args:
            x: (..., I).

        Returns:
            (..., O), in the base output's dtype.
        """
        y = super().forward(x)
        if self.dsee_dropout and self.training:
            x = nn.functional.dropout(x, self.dsee_dropout)
        return add_update(y, x, self.dsee_flat, self._update())

    @property
    def dsee_A(self) -> Tensor:
        """(K*R, I), view of the whole parameter."""
        return split_flat(self, self.dsee_flat)[0]

    @property
    def dsee_B(self) -> Tensor:
        """(S, R), view of the whole parameter."""
        return split_flat(self, self.dsee_flat)[1]

    @property
    def dsee_values(self) -> Tensor:
        """(K*N,), view of the whole parameter."""
        return split_flat(self, self.dsee_flat)[2]

    def _update(self) -> Update:
        """What the product needs besides the parameters; made anew if the buffers were moved."""
        if not torch.compiler.is_compiling() and self.dsee_update.support.rows is not self.dsee_rows:
            self.dsee_prepare()
        return self.dsee_update

    def dsee_prepare(self) -> None:
        """Prepare for the support in the buffers. Call it after writing other positions to them."""
        if self.dsee_rows.is_meta:
            return
        support = prepare(self.dsee_rows, self.dsee_cols, self.dsee_shape)
        shapes = flat_shapes(self)
        sparse, in_place = self.dsee_sparse, self.dsee_in_place
        self.dsee_update = Update(self.dsee_slices, shapes, self.dsee_scaling, support, sparse, in_place)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        if self.dsee_update.support.rows is not self.dsee_rows:
            self.dsee_prepare()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.dsee_prepare()

    def extra_repr(self) -> str:
        """The base layer's line, then the adapter's."""
        base = super().extra_repr()
        num_sparse = self.dsee_rows.numel() // len(self.dsee_slices)
        return f"{base}, rank={self.dsee_rank}, num_sparse={num_sparse}, slices={self.dsee_slices}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle through the base class: the subclass is made at run time and has no import name."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_blank, (self.dsee_base,), *state)


def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer class that adds a delta; the same one at every call."""
    if base not in _CLASSES:
        namespace = {"__module__": __name__, "dsee_base": base, "dsee_in_place": _keeps_no_output(base)}
        _CLASSES[base] = type(f"Adapted{base.__name__}", (AdaptedLayer, base), namespace)
    return _CLASSES[base]


def _keeps_no_output(base: type[nn.Module]) -> bool:
    """Whether the layer's backward is known not to need its output, so that it may be overwritten."""
    known = base.forward is nn.Linear.forward or base.__name__ == "Conv1D"
    return known or base.__module__.startswith("bitsandbytes")


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def attach(
    module: nn.Module,
    *,
    shape: tuple[int, int],
    transposed: bool,
    rank: int,
    scaling: float,
    slices: Sequence[tuple[int, int]],
    rows: Tensor,
    cols: Tensor,
    dropout: float = 0.0,
    sparse: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Turn a linear layer into an adapted one, in place. Reads nothing of the weight, so any storage will do.

    The layer's output stays the same bit for bit until the adapter is trained, since B and the values of S2
    start at zero. (Only a -0.0 may become 0.0.) The base parameters are neither replaced nor frozen here.

    Args:
        module: an `nn.Linear`, a transformers `Conv1D`, or a layer that is called like them.
        shape: true (O, I) of the weight.
        transposed: whether the weight is stored I x O.
        rank: R.
        scaling: s = alpha / rank.
        slices: K output ranges (start, stop), ascending and apart; ((0, O),) for the whole matrix.
        rows: (K*N,) output index of each entry of S2, in the whole weight.
        cols: (K*N,) input index of each entry; the entries sorted by (slice, row, col).
        dropout: in [0, 1), on the adapter's input.
        sparse: whether S2 is trained.
        generator: source of A, on any device; None takes PyTorch's global one.
        dtype: of A, B and values: what the layer computes in, which for a quantised weight is not its own.
        device: where they live.

    Raises:
        TargetError: the layer is adapted already, or slices and support do not fit the shape.
    """
    slices = tuple((int(start), int(stop)) for start, stop in slices)
    _check_attachable(module, shape, slices, rows, cols)
    flat = _initial(shape, slices, rank, rows.numel(), generator)
    module.dsee_flat = nn.Parameter(flat.to(device=device, dtype=dtype))
    module.register_buffer("dsee_rows", rows.to(device=device, dtype=torch.int32, copy=True))
    module.register_buffer("dsee_cols", cols.to(device=device, dtype=torch.int32, copy=True))
    true_shape = (int(shape[0]), int(shape[1]))
    settings = (rank, slices, float(scaling), float(dropout), sparse, true_shape, bool(transposed))
    for name, value in zip(ATTRIBUTES, settings, strict=True):
        setattr(module, name, value)
    module.__class__ = adapted_class(type(module))
    module.dsee_prepare()  # type: ignore[operator]


def _check_attachable(
    module: nn.Module, shape: tuple[int, int], slices: tuple[tuple[int, int], ...], rows: Tensor, cols: Tensor
) -> None:
    if is_adapted(module):
        raise TargetError(f"{type(module).__name__} is adapted already; detach it before adapting it again")
    if "forward" in vars(module):
        raise TargetError(
            f"the forward of this {type(module).__name__} was replaced on the instance, which would hide the "
            "adapter's (accelerate does so for a device_map over several devices); load it without that"
        )
    _check_support(shape, slices, rows, cols)


def _initial(
    shape: tuple[int, int],
    slices: Sequence[tuple[int, int]],
    rank: int,
    num_values: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Random A, zero B and zero values in one float32 vector, on the generator's device."""
    num_a = len(slices) * rank * shape[1]
    num_b = sum(stop - start for start, stop in slices) * rank
    device = generator.device if generator is not None else torch.device("cpu")
    flat = torch.zeros(num_a + num_b + num_values, device=device, dtype=torch.float32)
    flat[:num_a].normal_(std=A_STD, generator=generator)
    return flat


def detach(module: nn.Module) -> None:
    """Give an adapted layer its own class back and drop what `attach` added.

    Raises:
        TargetError: the layer is not adapted.
    """
    if not is_adapted(module):
        raise TargetError(f"{type(module).__name__} is not adapted, there is nothing to detach")
    module.__class__ = module.dsee_base  # type: ignore[assignment]
    for name in (PARAMETER, *BUFFERS, *ATTRIBUTES, "dsee_update"):
        delattr(module, name)


def is_adapted(module: object) -> bool:
    """Whether `attach` was applied to this very module."""
    return isinstance(module, AdaptedLayer)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted layers of a model by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def flat_shapes(module: nn.Module) -> Shapes:
    """Shapes of A, B and the values of an adapted layer, from its settings: the parameter may be partitioned."""
    slices: tuple[tuple[int, int], ...] = module.dsee_slices  # type: ignore[assignment]
    rank, inputs = int(module.dsee_rank), int(module.dsee_shape[1])  # type: ignore[arg-type, index]
    covered = sum(stop - start for start, stop in slices)
    return (len(slices) * rank, inputs), (covered, rank), (module.dsee_rows.numel(),)  # type: ignore[operator]


def split_flat(module: nn.Module, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and the values as views of an adapted layer's whole `dsee_flat`, or of what has its layout.

    Args:
        module: an adapted layer.
        flat: (K*R*I + S*R + K*N,); under ZeRO-3 a gathered copy.

    Returns:
        (K*R, I), (S, R) and (K*N,).
    """
    return split_shapes(flat, flat_shapes(module))


def delta_record(module: nn.Module, flat: Tensor) -> Delta:
    """What the layer adds to its weight.

    Args:
        module: an adapted layer.
        flat: whole `dsee_flat`; under ZeRO-3 the parameter itself is not.
    """
    a, b, values = split_flat(module, flat)
    settings = dict(slices=module.dsee_slices, scaling=module.dsee_scaling, shape=module.dsee_shape)
    support = dict(rows=module.dsee_rows, cols=module.dsee_cols)
    return Delta(a=a, b=b, values=values, **support, **settings, transposed=module.dsee_transposed)  # type: ignore[arg-type]


def _check_support(
    shape: tuple[int, int], slices: tuple[tuple[int, int], ...], rows: Tensor, cols: Tensor
) -> None:
    bounds = [0, *(edge for pair in slices for edge in pair), shape[0]]
    if not slices or bounds != sorted(bounds) or any(start == stop for start, stop in slices):
        raise TargetError(f"slices {slices} are not ascending ranges within the {shape[0]} outputs")
    if rows.shape != cols.shape or rows.dim() != 1 or not rows.numel() or rows.numel() % len(slices):
        raise TargetError(
            f"support of {tuple(rows.shape)} rows and {tuple(cols.shape)} columns, expected two equal "
            f"lengths that {len(slices)} slices share evenly, at least one entry each"
        )
    rows_KN = rows.detach().cpu().long().view(len(slices), -1)
    lows, highs = torch.tensor(slices).split(1, dim=1)
    if bool(((rows_KN < lows) | (rows_KN >= highs)).any()):
        raise TargetError(f"the support has rows outside of the slices {slices}")
    cols_KN = cols.detach().cpu().long().view(len(slices), -1)
    order_KN = rows_KN * shape[1] + cols_KN
    if bool(((cols_KN < 0) | (cols_KN >= shape[1])).any()) or bool((order_KN.diff(dim=1) <= 0).any()):
        raise TargetError(
            "the support's entries are not distinct, within the inputs, and sorted by (row, column)"
        )
