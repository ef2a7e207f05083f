"""Folders are complete or not there, and packed bits say exactly which entries are kept."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dsee_scale.checkpoint import masks as masks_module
from dsee_scale.checkpoint.files import MANIFEST
from dsee_scale.checkpoint.folder import HashedFile, new_folder, open_folder
from dsee_scale.checkpoint.masks import (
    apply_mask,
    check_kept,
    open_masks,
    pack_stretch,
    pack_with_torch,
    packed_size,
    save_masks,
    unpack_bits,
    unpack_with_torch,
)
from dsee_scale.checkpoint.tensors import TensorReader, runs, write_tensors
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.partition import open_partition

KINDS = ("adapter",)


def save(folder, tensors, *, overwrite=False, before_commit=lambda new: None):
    partition = open_partition(nn.Linear(1, 1))
    with new_folder(partition, folder, kind="adapter", overwrite=overwrite) as new:
        new.write_json("dsee_config.json", {"a": 1})
        write_tensors(new, "dsee_adapter.safetensors", tensors, kind="adapter")
        before_commit(new)


@pytest.mark.parametrize("block", [8, 16, 1 << 25])
@pytest.mark.parametrize("bounds", [(0, 41), (0, 1, 7, 8, 8, 17, 40, 41), (0, 20, 41), (0, 14, 28, 41)])
def test_stretches_packed_apart_equal_numpys_packbits_of_the_whole(bounds, block, monkeypatch):
    monkeypatch.setattr(masks_module, "CPU_CHUNK", block)
    data = torch.randn(41, generator=torch.Generator().manual_seed(0))
    data[torch.rand(41, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    data[40] = -0.0
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = np.zeros(packed_size(41), dtype=np.uint8)
        pack_stretch(data[start:stop], start, part)
        parts.append(part)
    together = np.sum(parts, axis=0, dtype=np.uint8)
    assert np.array_equal(together, np.packbits((data != 0).numpy()))
    for start, stop in itertools.pairwise(bounds):
        packed = torch.from_numpy(together[start // 8 : packed_size(stop)])
        assert torch.equal(unpack_bits(packed, start % 8, stop - start), data[start:stop] != 0)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096])
def test_bits_packed_on_an_accelerator_are_numpys(count):
    bits = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_with_torch(bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy()))
    assert torch.equal(unpack_with_torch(packed)[:count], bits)


def test_nan_counts_as_kept():
    bits = np.zeros(1, dtype=np.uint8)
    pack_stretch(torch.tensor([0.0, float("nan"), 1e-45, 0.0]), 0, bits)
    assert bits[0] == 0b01100000


@pytest.mark.parametrize("blocks", [(1 << 25, 1 << 17), (16, 8), (32, 24), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_mask_zeroes_the_same_entries_of_another_weight(tmp_path, dtype, blocks, monkeypatch):
    monkeypatch.setattr(masks_module, "_BLOCK", blocks[0])
    monkeypatch.setattr(masks_module, "CPU_CHUNK", blocks[1])
    model = nn.Linear(13, 7, dtype=dtype)
    with torch.no_grad():
        model.weight[torch.rand(7, 13) < 0.4] = 0
    partition = open_partition(model)
    with new_folder(partition, tmp_path / "m", kind="adapter", overwrite=False) as new:
        save_masks(partition, new, {"weight": model.weight}, 1)
    reader = open_masks(open_folder(tmp_path / "m", KINDS))
    assert os.path.getsize(tmp_path / "m" / "dsee_masks.safetensors") < 300
    other = nn.Linear(13, 7, dtype=dtype)
    expected = other.weight.detach().clone() * (model.weight != 0)
    with torch.no_grad():
        removed = torch.nonzero(model.weight == 0)[0]
        other.weight[tuple(removed)] = float("nan")
    apply_mask(open_partition(other), other.weight, reader, "weight")
    assert torch.equal(other.weight, expected)


@pytest.mark.parametrize("block", [1 << 25, 8, 24])
def test_bits_after_a_masks_last_entry_are_not_counted(tmp_path, block, monkeypatch):
    monkeypatch.setattr(masks_module, "_BLOCK", block)
    packed = torch.tensor(
        [0b10110001] * 5 + [0b01111111], dtype=torch.uint8
    )  # 43 entries, and 5 bits of nobody
    with new_folder(open_partition(nn.Module()), tmp_path / "m", kind="adapter", overwrite=False) as new:
        write_tensors(new, "dsee_masks.safetensors", {"weight": packed}, kind="adapter")
    reader = open_masks(open_folder(tmp_path / "m", KINDS))
    check_kept(reader, "weight", (43,), 22)
    check_kept(reader, "weight", (40,), 20)
    with pytest.raises(FormatError, match="the mask of weight keeps 22 of 43 entries, the record says 27"):
        check_kept(reader, "weight", (43,), 27)


def test_masks_of_many_weights_spread_over_files_are_all_found(tmp_path):
    weights = {f"w{i}": nn.Parameter(torch.randn(i + 1, 9).relu()) for i in range(5)}
    model = nn.Module()
    partition = open_partition(model)
    with new_folder(partition, tmp_path / "m", kind="adapter", overwrite=False) as new:
        save_masks(partition, new, weights, 1)
    reader = open_masks(open_folder(tmp_path / "m", KINDS))
    for name, weight in weights.items():
        bits = np.unpackbits(reader.read(name).numpy(), count=weight.numel())
        assert np.array_equal(bits.reshape(weight.shape), (weight != 0).numpy())


def test_runs_hold_every_name_once_in_order():
    sizes = {f"w{i}": i % 3 + 1 for i in range(10)}
    for parts in (1, 2, 3, 20):
        dealt = runs(sizes, parts)
        assert len(dealt) == parts
        assert [name for part in dealt for name in part] == list(sizes)
    assert runs({"a": 0}, 2)[0] == ["a"]


def test_a_written_file_is_read_by_safetensors_itself(tmp_path):
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "full": torch.randn(2, 3).t(),
        "long": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    save(tmp_path / "out", tensors)
    read = load_file(tmp_path / "out" / "dsee_adapter.safetensors")
    assert read.keys() == tensors.keys()
    reader = TensorReader([tmp_path / "out" / "dsee_adapter.safetensors"])
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_a_finished_folder_is_listed_whole_and_leaves_nothing_beside(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})
    stored = open_folder(tmp_path / "out", KINDS)
    assert set(stored.files) == {"dsee_config.json", "dsee_adapter.safetensors"}
    stored.verify(list(stored.files))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})
    with pytest.raises(ConfigError, match="not empty"):
        save(tmp_path / "out", {"x": torch.zeros(3)})
    save(tmp_path / "out", {"x": torch.zeros(3)}, overwrite=True)
    assert torch.equal(load_file(tmp_path / "out" / "dsee_adapter.safetensors")["x"], torch.zeros(3))


def test_what_a_killed_save_left_behind_does_not_matter(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})
    for left in (".out.partial", ".out.previous"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")
    assert torch.equal(load_file(tmp_path / "out" / "dsee_adapter.safetensors")["x"], torch.ones(3))
    save(tmp_path / "out", {"x": torch.zeros(3)}, overwrite=True)
    assert torch.equal(load_file(tmp_path / "out" / "dsee_adapter.safetensors")["x"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_foreign_files(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        save(tmp_path / "out", {"x": torch.zeros(3)}, overwrite=True)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.bin").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.bin"):
        save(tmp_path / "plain", {"x": torch.zeros(3)}, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_error_while_saving_leaves_the_previous_content(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})

    def fail(new):
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        save(tmp_path / "out", {"x": torch.zeros(3)}, overwrite=True, before_commit=fail)
    open_folder(tmp_path / "out", KINDS).verify(["dsee_adapter.safetensors"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_previous_content(tmp_path, monkeypatch):
    save(tmp_path / "out", {"x": torch.ones(3)})
    rename, calls = os.rename, []

    def fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(FormatError, match="Input/output error"):
        save(tmp_path / "out", {"x": torch.zeros(3)}, overwrite=True)
    assert len(calls) == 3 and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(load_file(tmp_path / "out" / "dsee_adapter.safetensors")["x"], torch.ones(3))


def test_a_full_disk_names_the_file(tmp_path):
    file = HashedFile(tmp_path / "x")
    file._file.close()
    file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device.*x"):
        file.write(b"1234")


def damage_truncate(folder):
    path = folder / "dsee_adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(folder):
    path = folder / "dsee_adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def damage_remove(folder):
    (folder / "dsee_adapter.safetensors").unlink()


def damage_manifest(folder):
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-20])


def damage_version(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))


def damage_kind(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "other"}))


def damage_no_manifest(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"dsee_adapter\.safetensors is \d+ bytes long"),
        (damage_flip, r"dsee_adapter\.safetensors is damaged: its SHA-256"),
        (damage_remove, r"dsee_adapter\.safetensors is missing"),
        (damage_manifest, r"dsee_manifest\.json is damaged"),
        (damage_version, "format version 99"),
        (damage_kind, "holds a 'other'"),
        (damage_no_manifest, "holds no dsee_manifest"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, damage, message):
    save(tmp_path / "out", {"x": torch.ones(3)})
    damage(tmp_path / "out")
    with pytest.raises(FormatError, match=message):
        stored = open_folder(tmp_path / "out", KINDS)
        stored.verify(list(stored.files))


def test_a_missing_folder_after_a_cut_off_swap_points_to_its_last_content(tmp_path):
    save(tmp_path / "out", {"x": torch.ones(3)})
    (tmp_path / "out").rename(tmp_path / ".out.previous")
    with pytest.raises(FormatError, match=r"\.out\.previous"):
        open_folder(tmp_path / "out", KINDS)


def test_a_file_that_is_no_safetensors_is_refused_by_name(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged"):
        TensorReader([tmp_path / "x.safetensors"])
