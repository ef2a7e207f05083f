"""Folders that dsee_scale reads, and seeded ways to damage them whose hashes fit, so that only the content can tell."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import dsee_scale
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.checkpoint.files import MANIFEST, sha256
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.config import PruneConfig
from dsee_scale.export.export import export_model
from dsee_scale.export.folder_report import inspect_folder
from dsee_scale.export.from_files import export_files
from dsee_scale.export.lora import export_lora, export_lora_files
from tests.models import build, llama_config
from tests.unit.test_adapter_files import LLAMA, tuned

TEXTS = ("", "x", "../../etc/passwd", "/abs", "n" * 5000, "\ud83d\ude00", "NaN", "model.safetensors")
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31,
    2**63,
    10**7,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1})


def make_folders(root: Path) -> dict[str, Path]:
    """One of every kind: adapter, training state, export of a plain and of a sparse model, masks without adapter, an
    export of unequal blocks, LoRA folders of PEFT and of ours, and an adapter beside its base.
    """
    model = tuned(llama_config(), LLAMA)
    save_adapter(model, root / "adapter")
    save_training_state(model, root / "state", optimizer=optimizer_of(model), extra={"step": 1})
    export_model(model, root / "export", delta="separate")
    export_model(model, root / "sparse")
    build(llama_config()).save_pretrained(root / "pair" / "base")  # type: ignore[operator]
    shutil.copytree(root / "adapter", root / "pair" / "adapter")
    masked = build(llama_config())
    dsee_scale.prune(masked, PruneConfig(sparsity=0.5, score="W"))
    save_adapter(masked, root / "masks")
    cut = build(llama_config(num_key_value_heads=5))
    dsee_scale.prune(cut, PruneConfig(pattern="heads", scope="global", sparsity=0.3, score="W"))
    save_adapter(cut, root / "units")
    export_model(cut, root / "unequal")
    lora = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 4}
    )
    get_peft_model(build(llama_config()), lora).save_pretrained(root / "lora")
    unpruned = build(llama_config())
    dsee_scale.inject(unpruned, LLAMA)
    export_lora(unpruned, root / "own lora")
    save_adapter(unpruned, root / "pair" / "plain")
    return {path.name: path for path in sorted(root.iterdir())}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has made a step, so that there are moments."""
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=0.0)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    return optimizer


def refresh_manifest(folder: Path) -> None:
    """Make sizes and hashes fit again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, record in manifest["files"].items():
            record.update(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
        (folder / MANIFEST).write_text(json.dumps(manifest))
    except Exception:  # the manifest itself was damaged, or a file is gone
        return


def damage(folder: Path, rng: random.Random) -> str:
    """One change to one file; a description."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    ways: list[Callable[[Path, random.Random], str]] = [_bytes, _truncate]
    ways += [_json, _json, _json, _json_text] if path.suffix == ".json" else [_tensors, _tensors, _header]
    try:
        what = rng.choice(ways)(path, rng)
    except (ValueError, RecursionError):  # what was damaged before cannot be damaged in this way
        what = "nothing"
    if path.parent != folder:
        refresh_manifest(path.parent)
    if rng.random() < 0.9:
        refresh_manifest(folder)
    return f"{path.relative_to(folder)}: {what}"


def _bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    return "bytes"


def _truncate(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] + (b"\0" * 9 if rng.random() < 0.3 else b""))
    return "cut"


def _json(path: Path, rng: random.Random) -> str:
    """Replace, remove, rename or repeat one value somewhere in the tree."""
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return "nothing"
    spots = list(_spots(tree))
    if not spots:
        return "nothing"
    parent, key = rng.choice(spots)
    how = rng.choice(("replace", "replace", "remove", "rename", "swap"))
    value = rng.choice((rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(OTHERS)))
    if how == "remove":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = parent.pop(key)
    elif how == "swap":
        other, name = rng.choice(spots)
        parent[key] = other[name] if other is not parent else value
    else:
        parent[key] = value
    try:
        path.write_text(json.dumps(tree))
    except (ValueError, RecursionError):  # a tree that now holds itself
        return "nothing"
    return f"{how} {key!r} {value!r}"[:80]


def _json_text(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    way = rng.choice(("deep", "twice", "list", "latin"))
    if way == "deep":
        path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif way == "twice":
        path.write_text(text.replace("{", '{"version": 9, "version": 1, ', 1))
    elif way == "list":
        path.write_text(f"[{text}]")
    else:
        path.write_bytes(text.encode() + b"\xe9")
    return way


def _tensors(path: Path, rng: random.Random) -> str:
    try:
        tensors = load_file(path)
    except Exception:
        return "nothing"
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    way = rng.choice(("value", "value", "shape", "dtype", "gone", "name"))
    if way == "value":
        flat = tensor.view(-1)
        extreme = rng.choice((float("nan"), float("inf"), -1e38, -1, 2**31 - 1, 255))
        at = rng.randrange(flat.numel())
        flat[at] = (
            extreme
            if flat.is_floating_point()
            else int(extreme) % 256
            if extreme == extreme and abs(extreme) < 1e10
            else 0
        )
        tensors[name] = tensor
    elif way == "shape":
        tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel())].contiguous()
    elif way == "dtype":
        tensors[name] = tensor.to(rng.choice((torch.int8, torch.float64, torch.bool, torch.int32)))
    elif way == "gone":
        del tensors[name]
    else:
        tensors[rng.choice(TEXTS[1:5])] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt", "dsee_version": "1"})
    return f"{way} {name}"


def _header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    size = rng.choice((0, 2**63, len(data), 100 << 20))
    path.write_bytes(size.to_bytes(8, "little") + data[8:])
    return f"header of {size}"


def _spots(tree: Any):
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _spots(value)


class Readers:
    """What reads a folder of each kind; models are made once and must come out of a refusal as they went in."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.base = build(llama_config())
        self.plain = {name: value.clone() for name, value in self.base.state_dict().items()}
        self.tuned = build(llama_config())
        load_adapter(self.tuned, folders["state"])
        self.optimizer = optimizer_of(self.tuned)

    def read(self, kind: str, folder: Path, rng: random.Random) -> bool:
        """Read it; whether the base was changed, which is right where nothing is raised."""
        if kind == "pair":
            self._export(folder, rng)
            return False
        if kind in ("lora", "own lora") or (kind in ("adapter", "state", "masks") and rng.random() < 0.6):
            if kind == "state" and rng.random() < 0.5:
                load_training_state(self.tuned, folder, optimizer=self.optimizer)
                return False
            load_adapter(self.base, folder)
            return True
        if kind in ("export", "sparse", "unequal") and rng.random() < 0.5:
            dsee_scale.load_pretrained(folder)
        else:
            inspect_folder(folder, verify=rng.random() < 0.5)
        return False

    def _export(self, folder: Path, rng: random.Random) -> None:
        """From files alone; a refusal leaves nothing at the output."""
        output = folder.with_name("output")
        if rng.random() < 0.7:
            export_files(
                folder / "adapter", folder / "base", output, delta=rng.choice(("masked", "separate"))
            )
        else:
            export_lora_files(folder / "plain", output, base=folder / "base")
        shutil.rmtree(output)

    def is_untouched(self) -> bool:
        """Whether the base model is the one that was made."""
        found = self.base.state_dict()
        return found.keys() == self.plain.keys() and all(
            torch.equal(found[n], v) for n, v in self.plain.items()
        )

    def renew(self) -> None:
        """A base of its own after a load that went well."""
        self.base = build(llama_config())
