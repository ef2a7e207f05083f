"""Load any exported folder, those included that stock transformers cannot: unequal layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.algorithms.score import all_finite
from dsee_scale.checkpoint.files import damaged, read_json
from dsee_scale.checkpoint.folder import open_if_saved
from dsee_scale.checkpoint.pretrained import read_config
from dsee_scale.errors import FormatError, TargetError
from dsee_scale.export.report import KIND
from dsee_scale.export.resize import read_structure, resize_blocks
from dsee_scale.export.structure import STRUCTURE_FILE, BlockSizes
from dsee_scale.passes.pools import block_linears


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
            which is never run here.
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
        raise FormatError(f"{path} holds no config.json; expected a folder that export_model wrote")
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
