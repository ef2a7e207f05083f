"""Weights quantised by bitsandbytes. The only file that knows how it stores a parameter.

`Linear4bit` (nf4, fp4): two codes in a byte, the first entry in the high half, in row-major order; a code's
value times the absolute maximum of its block (64 entries) is the entry. `bnb_4bit_quant_storage` views the
bytes as another dtype. `Linear8bitLt`: an int8 for each entry, times the row's scale / 127.

All formats have codes of value zero, so a mask can be written into the codes themselves. Block maxima and row
scales are no parameters: every rank keeps all of them (0.5 bit for each 4-bit entry, 0.127 with double
quantisation).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.algorithms import bits
from dsee_scale.errors import TargetError

CPU_CHUNK = 1 << 20
"""Entries decoded at once on a CPU; even, so that no byte is cut."""
INT8_STEP = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it, so that decoding rounds alike."""


@dataclass(frozen=True, eq=False)
class FourBit:
    """How a `Linear4bit` stores its weight.

    Attributes:
        module: the layer; its quantisation state moves between devices, so it is read at each use.
        shape: true (O, I).
        dtype: of decoded entries.
    """

    module: Any
    shape: torch.Size
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """`nf4` or `fp4`."""
        return self._state.quant_type

    @property
    def extra_bytes(self) -> int:
        """What stays on every rank beside the codes."""
        state = self._state
        inner = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
        return sum(tensor.numel() * tensor.element_size() for tensor in inner)

    def decode(self, stored: Tensor, start: int = 0) -> tuple[Tensor, int]:
        """Entries of a stretch of the stored weight, 1-D, and the flat position of the first one."""
        codes = stored.reshape(-1).view(torch.uint8)
        first = 2 * start * stored.element_size()
        count = max(0, min(2 * codes.numel(), self.shape.numel() - first))
        out = torch.empty(count, dtype=self.dtype, device=codes.device)
        pairs, maxima = self._pairs(codes.device), self._maxima(codes.device)
        chunk = _chunk(codes)
        for at in range(0, count, chunk):
            part = out[at : at + chunk]
            values = pairs[codes[at // 2 : (at + part.numel() + 1) // 2].int()].view(-1)[: part.numel()]
            part.copy_(values * self._spread(maxima, first + at, part.numel()))
        return out, first

    def zero(self, stored: Tensor, entries: Tensor) -> None:
        """Write the zero code wherever an entry of the decoded stretch is 0."""
        codes = stored.view(-1).view(torch.uint8)
        code = int((self._state.code == 0).nonzero()[0])
        chunk = _chunk(codes)
        for at in range(0, entries.numel(), chunk):
            gone = entries[at : at + chunk] == 0
            if gone.numel() % 2:
                gone = torch.cat([gone, gone.new_zeros(1)])
            both = codes[at // 2 : at // 2 + gone.numel() // 2]
            high, low = both & 0xF0, both & 0x0F
            high.masked_fill_(gone[0::2], code << 4)
            both.copy_(high | low.masked_fill_(gone[1::2], code))

    @property
    def _state(self) -> Any:
        return getattr(self.module.weight, "quant_state", None) or self.module.quant_state

    def _pairs(self, device: torch.device) -> Tensor:
        """(256, 2): the two values of each byte."""
        values = self._state.code.to(device).float()
        return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)

    def _maxima(self, device: torch.device) -> Tensor:
        state = self._state
        if not state.nested:
            return state.absmax.to(device).float()
        from bitsandbytes.functional import dequantize_blockwise

        return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float().to(device)

    def _spread(self, maxima: Tensor, first: int, count: int) -> Tensor:
        size = self._state.blocksize
        blocks = maxima[first // size : -(-(first + count) // size)]
        return blocks.repeat_interleave(size)[first % size : first % size + count]


@dataclass(frozen=True, eq=False)
class EightBit:
    """How a `Linear8bitLt` stores its weight; attributes as in `FourBit`."""

    module: Any
    shape: torch.Size
    dtype: torch.dtype
    kind = "int8"

    @property
    def extra_bytes(self) -> int:
        """What stays on every rank beside the codes."""
        return 4 * self.shape[0]

    def decode(self, stored: Tensor, start: int = 0) -> tuple[Tensor, int]:
        """Entries of a stretch of the stored weight, 1-D, and the flat position of the first one."""
        codes = stored.reshape(-1)
        out = torch.empty(codes.numel(), dtype=self.dtype, device=codes.device)
        scales, columns = _row_scales(self.module).to(codes.device), self.shape[1]
        chunk = _chunk(codes)
        for at in range(0, codes.numel(), chunk):
            part = codes[at : at + chunk]
            first = start + at
            rows = scales[first // columns : -(-(first + part.numel()) // columns)]
            scale = rows.repeat_interleave(columns)[first % columns : first % columns + part.numel()]
            out[at : at + chunk] = part * scale * INT8_STEP
        return out, start

    def zero(self, stored: Tensor, entries: Tensor) -> None:
        """Write the zero code wherever an entry of the decoded stretch is 0."""
        stored.view(-1).masked_fill_(entries == 0, 0)


Codec = FourBit | EightBit


def _chunk(codes: Tensor) -> int:
    """Entries at once: an accelerator, where each chunk costs the host several launches, takes more."""
    return CPU_CHUNK if bits.is_host(codes.device) else bits.DEVICE_CHUNK


def quantised_kind(module: nn.Module) -> str | None:
    """`4bit`, `8bit`, or None for a layer that bitsandbytes has not quantised."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes"):
            return {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}.get(cls.__name__)
    return None


def holds_numbers(dtype: torch.dtype) -> bool:
    """Whether a weight's entries are numbers, not codes with scales beside them, as integers and FP8 are."""
    return dtype.is_floating_point and dtype.itemsize > 1


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that bitsandbytes has quantised."""
    return ((name, module) for name, module in model.named_modules() if quantised_kind(module))


def find_codecs(model: nn.Module) -> dict[int, Codec]:
    """How each quantised weight of a model is stored, by the parameter's `id`. Local."""
    layers = dict(quantised_layers(model))
    if not layers:
        return {}
    weights = {id(layer.weight) for layer in layers.values()}
    plain = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in weights)
    dtype = next(plain, torch.float32)
    codecs: dict[int, Codec] = {}
    for layer in layers.values():
        shape = torch.Size((layer.out_features, layer.in_features))
        if quantised_kind(layer) == "8bit":
            codecs[id(layer.weight)] = EightBit(layer, shape, dtype)
        else:
            state = getattr(layer.weight, "quant_state", None) or layer.quant_state
            codecs[id(layer.weight)] = FourBit(layer, shape, state.dtype if state is not None else dtype)
    return codecs


def as_stored(weight: Tensor, quantisation: Mapping[str, Any]) -> Tensor:
    """What is left of a weight that is quantised and decoded again.

    Args:
        weight: (O, I), floating point.
        quantisation: a `BitsAndBytesConfig` as a mapping.

    Returns:
        (O, I) in the weight's dtype.
    """
    from bitsandbytes import functional

    if quantisation.get("load_in_8bit"):
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        layer = SimpleNamespace(weight=SimpleNamespace(SCB=scales))
        return EightBit(layer, weight.shape, weight.dtype).decode(codes)[0].view(weight.shape)
    codes, state = functional.quantize_4bit(
        weight.contiguous(),
        quant_type=quantisation.get("bnb_4bit_quant_type", "fp4"),
        compress_statistics=bool(quantisation.get("bnb_4bit_use_double_quant")),
    )
    layer = SimpleNamespace(weight=SimpleNamespace(quant_state=state))
    return FourBit(layer, weight.shape, weight.dtype).decode(codes)[0].view(weight.shape)


def format_name(quantisation: Mapping[str, Any]) -> str:
    """`int8`, `nf4` or `fp4`, of a `BitsAndBytesConfig` as a mapping."""
    if quantisation.get("load_in_8bit"):
        return "int8"
    return str(quantisation.get("bnb_4bit_quant_type", "fp4"))


def compute_dtype(layer: Any, codec: Codec) -> torch.dtype:
    """What a quantised layer computes in, and so what its adapter is made in."""
    return getattr(layer, "compute_dtype", None) or codec.dtype


def prepare_quantised(model: nn.Module) -> None:
    """Make quantised layers fit for training, on every rank alike. Local; calling it again changes nothing.

    - On CPUs with avx512_bf16, bitsandbytes (0.50) repacks a `Linear4bit` in its first forward without
      gradients in eval mode, for good; training then has no gradients, or under ZeRO-3 a senseless loss.
      That is switched off, and what was repacked is put back.
    - A `Linear8bitLt` keeps a second reference to its whole weight, and the backward of a `Linear4bit` keeps
      the weight that its forward saw. Under ZeRO-3 either holds every gathered weight on every rank. Both are
      led to the parameter instead, which is whole whenever the layer runs.

    Raises:
        TargetError: layers that are not quantised yet, or keep 16-bit weights.
    """
    for name, layer in quantised_layers(model):
        if quantised_kind(layer) == "4bit":
            _prepare_four_bit(name, layer)
        else:
            _prepare_eight_bit(name, layer)


def _prepare_four_bit(name: str, layer: Any) -> None:
    layer.support_avx512bf16_for_cpu = False
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise TargetError(
            f"{name} is a Linear4bit that is not quantised yet; load the model with a BitsAndBytesConfig, or "
            "move it to its device, which quantises it, before inject"
        )
    if getattr(state, "packing_format_for_cpu", False):
        _unpack(layer, state)
    if layer.weight.device.type == "cpu" and not _decodes_right(layer.in_features, state.blocksize):
        raise TargetError(
            f"{name} has {layer.in_features} inputs, and this bitsandbytes decodes such rows wrongly on the CPU "
            f"(they are no multiple of its blocks of {state.blocksize} entries); run on a GPU, load in 8 bits, or "
            "add the layer to llm_int8_skip_modules in the BitsAndBytesConfig"
        )
    if _use_live_weight not in layer._forward_hooks.values():
        layer.register_forward_hook(_use_live_weight)


@functools.cache
def _decodes_right(inputs: int, blocksize: int) -> bool:
    """Whether bitsandbytes reads back what it stored, for rows of this length on the CPU.

    0.50.2 does not where a row is longer than a block, even, and no multiple of it.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    sample = torch.randn(3, inputs, generator=torch.Generator().manual_seed(0))
    stored, state = quantize_4bit(sample, quant_type="nf4", blocksize=blocksize)
    layer = SimpleNamespace(weight=SimpleNamespace(quant_state=state))
    return torch.equal(
        dequantize_4bit(stored, state).view(-1), FourBit(layer, sample.shape, sample.dtype).decode(stored)[0]
    )


def _unpack(layer: Any, state: Any) -> None:
    """Undo the repacking. The block maxima were rounded to bfloat16 by it and stay so."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

    flat = None if state.original_nested else state.absmax.T.reshape(-1).float()
    layer.weight.data, restored = inverse(layer.weight.data, state)
    if flat is not None:  # bitsandbytes 0.50 restores only nested maxima
        restored.absmax = flat
    layer.weight.quant_state = layer.quant_state = restored


def _prepare_eight_bit(name: str, layer: Any) -> None:
    if layer.state.has_fp16_weights or layer.weight.dtype != torch.int8:
        raise TargetError(
            f"{name} is a Linear8bitLt with {layer.weight.dtype} weights; expected int8: load the model with "
            "BitsAndBytesConfig(load_in_8bit=True) and without llm_int8_has_fp16_weight"
        )
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    if not isinstance(layer.state, _live_state_class()):
        layer.state.__dict__.pop("CB", None)
        layer.state.__class__ = _live_state_class()
        layer.state._dsee_layer = layer


_STATE_CLASSES: list[type] = []


def _live_state_class() -> type:
    """bitsandbytes' state of an 8-bit layer, whose codes are always the layer's own parameter."""
    if not _STATE_CLASSES:
        from bitsandbytes import MatmulLtState

        def codes(self: Any) -> Tensor:
            return self._dsee_layer.weight.data

        def ignore(self: Any, value: Any) -> None:
            """The parameter is the only copy."""

        _STATE_CLASSES.append(type("LiveState", (MatmulLtState,), {"CB": property(codes, ignore)}))
    return _STATE_CLASSES[0]


class _LiveWeight:
    """Stands where the backward of a 4-bit product unpacks what its forward saved."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __iter__(self) -> Iterator[Tensor | None]:
        yield None
        yield self.layer.weight.data.view(-1, 1)


def _use_live_weight(layer: Any, args: Any, output: Any) -> None:
    """Forward hook: let the backward read the parameter. The product's node is below the adapter's and a cast."""
    node = getattr(output, "grad_fn", None)
    for _ in range(3):
        if node is None:
            return
        if node.name() == "MatMul4BitBackward":
            if isinstance(node.tensors, tuple) and node.tensors[1] is not None:
                node.tensors = _LiveWeight(layer)
            return
        node = node.next_functions[0][0] if node.next_functions else None


def _row_scales(layer: Any) -> Tensor:
    scales = getattr(layer.weight, "SCB", None)
    return (layer.state.SCB if scales is None else scales).float()
