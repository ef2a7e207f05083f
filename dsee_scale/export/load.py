"""Load any exported folder, those included that stock transformers cannot: unequal layers.

Also the architecture alone that a record describes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.adapters.families import Experts, Family, family_of, find_blocks, inner
from dsee_scale.adapters.matrices import expert_layout
from dsee_scale.adapters.routers import router_tensors
from dsee_scale.adapters.state import model_state
from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.algorithms.score import all_finite
from dsee_scale.checkpoint.files import damaged, read_json
from dsee_scale.checkpoint.folder import FORMAT_VERSION, instead_of, open_if_saved
from dsee_scale.errors import FormatError, TargetError
from dsee_scale.export.report import KIND
from dsee_scale.export.structure import STRUCTURE_FILE, BlockSizes, Structure
from dsee_scale.passes.pools import block_linears
from dsee_scale.pretrained import read_config, reject_endless


def load_pretrained(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    semi_structured: bool = False,
    verify: bool = True,
) -> Any:
    """Load a model that `export_model` wrote, of any pattern; a plain model folder works too.

    Args:
        folder: the exported folder.
        dtype: of the weights; None takes the exported one.
        device: where the model goes; None is the CPU.
        semi_structured: let 2:4 weights run through PyTorch's semi-structured kernels (NVIDIA, compute
            capability 8.0 or more, half precision). The model is for inference then.
        verify: compare all files with their saved hashes first.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        FormatError: a file is damaged, incomplete, changed or of an unknown version; the folder needs code of its own,
            which is never run here; or it holds an injected model that save_pretrained wrote.
        TargetError: `semi_structured` without a fitting device or weight.
    """
    path = Path(folder)
    stored = open_if_saved(path, (KIND,))
    if stored is not None and verify:
        stored.verify_all()
    config, stock = _config_and_class(path)
    blocks = None
    if (path / STRUCTURE_FILE).is_file():
        values = stored.json(STRUCTURE_FILE) if stored else read_json(path / STRUCTURE_FILE)
        blocks = read_structure(values, str(path / STRUCTURE_FILE))
        _reject_partitioned_load()
    cls = stock if blocks is None else _resized_class(stock, blocks, str(path / STRUCTURE_FILE))
    with damaged(path):
        model, info = cls.from_pretrained(
            path, config=config, dtype=dtype or "auto", output_loading_info=True
        )
    absent = sorted(info["missing_keys"])
    if absent:
        raise FormatError(
            f"{path} holds no weight {absent[0]} (and {len(absent) - 1} more); use another copy of it"
        )
    for name, param in model.named_parameters():
        if not all_finite(param.detach()):
            raise FormatError(f"{path}: weight {name} holds NaN or infinity; use another copy of it")
    model.__class__ = stock
    if device is not None:
        model.to(device)
    if semi_structured:
        use_semi_structured(model)
    return model.eval()


@torch.no_grad()
def use_semi_structured(model: nn.Module) -> list[str]:
    """Turn the 2:4 weights of a model's blocks into semi-structured tensors, in place; their module names.

    Raises:
        TargetError: the model is not on a fitting GPU, or no weight fits.
    """
    linears = {name: m for name, m in block_linears(model).items() if isinstance(m, nn.Linear)}
    devices = {module.weight.device for module in linears.values()}
    if not all(one.type == "cuda" and torch.cuda.get_device_capability(one) >= (8, 0) for one in devices):
        raise TargetError(
            f"semi-structured kernels need an NVIDIA GPU of compute capability 8.0 or more, the model is on "
            f"{', '.join(sorted(map(str, devices))) or 'no device'}; move it there, or leave semi_structured out"
        )
    converted = []
    for name, module in linears.items():
        if module.in_features % 4 or not groups_hold(module.weight, 2, 4):
            continue
        try:
            module.weight = nn.Parameter(_semi_structured(module.weight), requires_grad=False)
        except RuntimeError as error:  # sizes or a dtype that the kernels do not take
            raise TargetError(f"{name}.weight is 2:4, but its kernel refuses it: {error}") from error
        converted.append(name)
    if not converted:
        raise TargetError(
            "no nn.Linear in the blocks is 2:4 along its inputs (a Conv1D, stored I x O, these kernels do not "
            "run); prune with PruneConfig(pattern='2:4')"
        )
    return converted


def _semi_structured(weight: Tensor) -> Tensor:
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight.contiguous())


def _config_and_class(path: Path) -> tuple[Any, Any]:
    import transformers

    if not (path / "config.json").is_file():
        found = "holds no config.json" if path.is_dir() else "is not a folder"
        raise FormatError(
            instead_of(path, (KIND,)) or f"{path} {found}; expected a folder that export_model wrote"
        )
    try:
        config = read_config(path)
    except Exception as error:  # each config class refuses values in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"{path / 'config.json'} cannot be read: {reason}") from error
    with damaged(path / "config.json"):
        name = str((config.architectures or ["none"])[0])
        stock = getattr(transformers, name, None)
    if stock is None:
        raise FormatError(f"{path / 'config.json'}: transformers has no class {name!r}")
    return config, stock


def _resized_class(stock: Any, blocks: Mapping[str, BlockSizes], where: str) -> Any:
    """A subclass whose instances have the files' sizes from the start, so that stock loading fits them."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        resize_blocks(self, blocks, where)

    return type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})


def _reject_partitioned_load() -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise TargetError(
            "a folder of unequal layers cannot be loaded into ZeRO-3 partitions; load it before the "
            "HfDeepSpeedConfig is made, or prune every layer by the same number"
        )


HEADS = {"heads", "kv_heads", "head_size"}


def read_structure(values: Mapping[str, Any], where: str) -> dict[str, BlockSizes]:
    """Block sizes from `dsee_structure.json`.

    Raises:
        FormatError: an unknown version, or values that make no sense.
    """
    if values.get("version") != FORMAT_VERSION:
        raise FormatError(
            f"{where} has format version {values.get('version')!r}, expected {FORMAT_VERSION}; use the "
            "dsee_scale that wrote it"
        )
    try:
        blocks = {name: BlockSizes(**sizes) for name, sizes in values["blocks"].items()}
        sound = all(sizes and min(sizes.values()) >= 1 for sizes in values["blocks"].values())
        if any(len(HEADS & set(sizes)) not in (0, len(HEADS)) for sizes in values["blocks"].values()):
            raise KeyError(f"expected {', '.join(sorted(HEADS))} together")
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where} is damaged: {error}; use another copy of it") from error
    if not blocks or not sound:
        raise FormatError(f"{where} is damaged: expected positive sizes for every block")
    return blocks


def resize_blocks(model: nn.Module, blocks: Mapping[str, BlockSizes], where: str) -> None:
    """Give a freshly made model the sizes of its files, and note them; values of weights are not kept. Local.

    Raises:
        FormatError: the blocks are not those of this model.
    """
    family = family_of(model)
    found = find_blocks(model, family)
    other = set(blocks) - set(found) if family.experts else set(blocks) ^ set(found)
    if other:
        raise FormatError(
            f"{where} and the model differ in blocks {', '.join(sorted(other)[:3])}; "
            "the folder was put together from different models"
        )
    for name, sizes in blocks.items():
        if family.experts is None:
            _resize_neurons(found[name], name, family, sizes)
        elif sizes.experts is not None or sizes.neurons is not None:  # a dense block among others has neither
            _resize_experts(found[name], name, family.experts, sizes)
        if sizes.heads is not None:
            _resize_heads(found[name], name, family, sizes)
    model_state(model).blocks = Structure(dict(blocks), dict(blocks), {}, 0).to_dict()["blocks"]


def _resize_heads(block: nn.Module, name: str, family: Family, sizes: BlockSizes) -> None:
    width, kv_width = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size  # type: ignore[operator]
    fused = len(family.qkv) == 1
    outputs = (3 * width,) if fused else (width, kv_width, kv_width)
    for path, size in zip(family.qkv, outputs, strict=True):
        _set_size(inner(block, path, name), outputs=size)
    _set_size(inner(block, family.o, name), inputs=width)
    for path, what in family.head_attributes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(inner(block, owner, name) if owner else block, attribute, sizes.size(what))


def _resize_neurons(block: nn.Module, name: str, family: Family, sizes: BlockSizes) -> None:
    for path in family.up:
        _set_size(inner(block, path, name), outputs=sizes.neurons)
    _set_size(inner(block, family.down, name), inputs=sizes.neurons)


def _resize_experts(block: nn.Module, name: str, where: Experts, sizes: BlockSizes) -> None:
    """Fewer experts, or smaller ones; their router has a row for each."""
    module, router = inner(block, where.path, name), inner(block, where.router, name)
    layout = expert_layout(module)
    assert layout is not None
    old = len(getattr(module, layout.up))
    experts = sizes.experts or old
    if sizes.neurons is not None:
        outputs, axis = sizes.neurons * (2 if layout.gated else 1), 2 if layout.transposed else 1
        _set_length(module, layout.up, axis, outputs)
        _set_length(module, layout.down, 3 - axis, sizes.neurons)
        if layout.bias:
            _set_length(module, f"{layout.up}_bias", 1, outputs)
    names = [layout.up, layout.down]
    names += [f"{each}_bias" for each in names] if layout.bias else []
    for attribute in names:
        _set_length(module, attribute, 0, experts)
    for attribute in router_tensors(router, old, lambda param: param.shape):
        _set_length(router, attribute, 0, experts)
    module.num_experts = router.num_experts = experts


def _set_length(module: Any, attribute: str, axis: int, length: int) -> None:
    """Make a parameter or buffer anew, of another length along an axis."""
    tensor = getattr(module, attribute)
    shape = tuple(length if i == axis else size for i, size in enumerate(tensor.shape))
    made = _like(tensor, shape) if isinstance(tensor, nn.Parameter) else tensor.new_empty(shape)
    setattr(module, attribute, made)


def _set_size(module: Any, *, outputs: int | None = None, inputs: int | None = None) -> None:
    """Make a Linear's or Conv1D's parameters anew, of other sizes, where and what they were."""
    transposed = not isinstance(module, nn.Linear)
    old_outputs, old_inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    shape = (outputs or old_outputs, inputs or old_inputs)
    if shape == (old_outputs, old_inputs):
        return
    module.weight = _like(module.weight, shape[::-1] if transposed else shape)
    if outputs and module.bias is not None:
        module.bias = _like(module.bias, (outputs,))
    if transposed:
        module.nx, module.nf = shape[1], shape[0]
    else:
        module.in_features, module.out_features = shape[1], shape[0]


def _like(param: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(param.new_empty(shape), requires_grad=param.requires_grad)


def is_recorded(identity: Mapping[str, Any]) -> bool:
    """Whether a saved record says enough of a model, of a class that transformers knows. Local."""
    import transformers

    return bool(identity.get("full_config")) and hasattr(transformers, str(identity.get("class")))


def recorded_model(
    identity: Mapping[str, Any], pruned: Mapping[str, dict[str, Any]], where: str
) -> nn.Module:
    """The architecture that a saved record describes, without weights, in its dtype, with its prunings noted. Local.

    Args:
        identity: `base_model` of the record.
        pruned: how each weight was pruned.
        where: file, for errors.

    Raises:
        FormatError: the record does not say enough, or transformers does not know the class.
    """
    import transformers

    if not is_recorded(identity):
        raise FormatError(
            f"{where} holds no config of a class that transformers knows ({identity.get('class')}), so what "
            "was removed cannot be cut out; load the base, load_adapter, and export_model, or use "
            "delta 'separate'"
        )
    reject_endless(identity["full_config"], where)
    dtype = getattr(torch, str(identity.get("dtype", "float32")), None)
    with damaged(where), torch.device("meta"), _made_in(dtype):
        stock = getattr(transformers, str(identity["class"]))
        model = stock(stock.config_class.from_dict(dict(identity["full_config"])))
        if identity.get("blocks"):
            values = {"version": FORMAT_VERSION, "blocks": identity["blocks"]}
            resize_blocks(model, read_structure(values, where), where)
    model_state(model).pruned.update(pruned)
    return model


@contextlib.contextmanager
def _made_in(dtype: Any) -> Iterator[None]:
    """New parameters are of this dtype, unless a model says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
