"""Compressed weights: what is read is what was written, and nothing damaged is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.checkpoint.folder import MANIFEST, open_folder, sha256
from dsee_scale.checkpoint.tensors import TensorSpec
from dsee_scale.cli import main
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.export import sparse as compressed
from dsee_scale.export.convert import convert_folder
from dsee_scale.export.export import KIND, export_model
from tests.models import gpt2_config, llama_config, token_batch
from tests.unit.test_export import tuned

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def suffixed(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.rsplit(".", 1)[-1]: value for name, value in parts.items()}


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 33)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_keeps_every_bit(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.5, float("inf"), float("nan"), -3.0], dtype=dtype)
    weight = values[torch.randint(0, 6, shape, generator=generator)]
    parts = compressed.compress("a.weight", weight)
    kept = int((bits(weight).view(*shape, -1) != 0).any(dim=-1).sum())
    specs = compressed.compressed_specs(TensorSpec("a.weight", dtype, shape), kept)
    assert {(s.name, s.dtype, s.shape) for s in specs} == {
        (name, part.dtype, tuple(part.shape)) for name, part in parts.items()
    }
    assert torch.equal(bits(compressed.decompress(suffixed(parts), "here")), bits(weight))


def test_the_layout_is_the_one_of_compressed_tensors():
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0], [4.0] + [0.0] * 8])
    parts = compressed.compress("layer.weight", weight)
    assert parts["layer.compressed"].tolist() == [1, 2, 3, 4]
    assert parts["layer.bitmask"].tolist() == [[0b1010, 1], [1, 0]]
    assert parts["layer.row_offsets"].tolist() == [0, 3]
    assert parts["layer.shape"].tolist() == [2, 9]
    unpacked = np.unpackbits(parts["layer.bitmask"].numpy(), axis=-1, count=9, bitorder="little")
    assert np.array_equal(unpacked, (weight != 0).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_own_reader_reads_ours_and_writes_the_same(dtype):
    """Versions up to 0.11 have it; later ones know the format's name alone."""
    library = pytest.importorskip("compressed_tensors.compressors.sparse_compressors.sparse_bitmask")
    weight = torch.randn(5, 19).masked_fill(torch.rand(5, 19) < 0.5, 0).to(dtype)
    ours = suffixed(compressed.compress("w.weight", weight))
    assert torch.equal(library.BitmaskTensor(**ours).decompress(), weight)
    theirs = library.BitmaskTensor.from_dense(weight).dict("w")
    assert {name: value.tolist() for name, value in suffixed(theirs).items()} == {
        name: value.tolist() for name, value in ours.items()
    }


def test_half_of_a_bfloat16_weight_takes_0_56_of_it():
    spec = TensorSpec("w.weight", torch.bfloat16, (4096, 4096))
    parts = compressed.compressed_specs(spec, 4096 * 2048)
    assert sum(part.nbytes for part in parts) / spec.nbytes == pytest.approx(0.5635, abs=2e-4)
    assert compressed.pays(spec, 4096 * 2048) and not compressed.pays(spec, 4096 * 4000)


@pytest.mark.parametrize(
    "part, change",
    [
        ("bitmask", lambda t: t ^ 1),
        ("bitmask", lambda t: t[:, :-1]),
        ("compressed", lambda t: t[:-1]),
        ("row_offsets", lambda t: t + 1),
        ("shape", lambda t: t + 1),
        ("bitmask", lambda t: t | 0b10000000),
    ],
)
def test_parts_that_contradict_each_other_are_refused(part, change):
    weight = torch.eye(7, 15)
    parts = suffixed(compressed.compress("w.weight", weight))
    with pytest.raises(FormatError, match="here"):
        compressed.decompress({**parts, part: change(parts[part])}, "here")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    stored = open_folder(folder, (KIND,))
    reader = compressed.SparseReader.of(stored)
    return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["2GB", "20KB"])
@pytest.mark.parametrize("name, config", [("llama", llama_config()), ("gpt2", gpt2_config())])
def test_sparse_and_dense_exports_hold_the_same_weights(tmp_path, name, config, dtype, shard):
    model = tuned(config, name, dtype=dtype)
    dense = export_model(model, tmp_path / "dense", max_shard_size=shard)
    sparse = export_model(model, tmp_path / "sparse", format="sparse", max_shard_size=shard)
    expected: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "dense").glob("*.safetensors"):
        expected |= load_file(path)
    found = weights(tmp_path / "sparse")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(bits(found[key]), bits(tensor)), key
    assert (sparse.sparsity, sparse.num_parameters) == (dense.sparsity, dense.num_parameters)
    assert sparse.nbytes < dense.nbytes
    assert sparse.loads_with == "dsee_scale.load_pretrained" and dense.loads_with == "transformers"
    assert len(sparse.files) > 1 or shard == "2GB"


def test_load_pretrained_gives_the_same_logits_from_sparse_and_dense_files(tmp_path):
    model = tuned(llama_config(), dtype=torch.bfloat16)
    export_model(model, tmp_path / "dense")
    export_model(model, tmp_path / "sparse", format="sparse")
    loaded = [dsee_scale.load_pretrained(tmp_path / kind) for kind in ("dense", "sparse")]
    with torch.no_grad():
        logits = [one(token_batch()).logits for one in loaded]
    assert torch.equal(*logits)
    assert all(next(one.parameters()).dtype == torch.bfloat16 for one in loaded)
    assert loaded[0].generation_config.to_dict() == loaded[1].generation_config.to_dict()
    single = dsee_scale.load_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert next(single.parameters()).dtype == torch.float32


def test_stock_transformers_refuses_a_sparse_folder(tmp_path):
    """It must not load what it finds and make up the rest."""
    model = tuned(llama_config())
    export_model(model, tmp_path / "sparse", format="sparse")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        type(model).from_pretrained(tmp_path / "sparse")


@pytest.mark.parametrize("form", ["masked", "separate"])
def test_folders_convert_to_sparse_and_back(tmp_path, form):
    model = tuned(llama_config(), dtype=torch.bfloat16)
    export_model(model, tmp_path / "dense", delta=form, max_shard_size="20KB")
    arguments = ["--json", "--output"]
    assert (
        main(["export", str(tmp_path / "dense"), "--format", "sparse", *arguments, str(tmp_path / "s")]) == 0
    )
    assert main(["export", str(tmp_path / "s"), "--format", "dense", *arguments, str(tmp_path / "d")]) == 0
    for path in sorted((tmp_path / "dense").rglob("*")):
        if not path.is_file() or path.name.startswith("dsee_"):
            continue
        again = tmp_path / "d" / path.relative_to(tmp_path / "dense")
        assert path.suffix == ".safetensors" or again.read_bytes() == path.read_bytes(), path
        if path.suffix == ".safetensors" and path.parent == tmp_path / "dense":
            before, after = load_file(path), load_file(again)
            assert before.keys() == after.keys()
            assert all(torch.equal(bits(before[key]), bits(after[key])) for key in before)
    sizes = [sum(p.stat().st_size for p in (tmp_path / f).glob("*.safetensors")) for f in ("s", "dense")]
    assert sizes[0] < sizes[1]


def test_a_plain_folder_of_zeros_converts(tmp_path):
    tensors = {"a.weight": torch.eye(64), "b.weight": torch.ones(64, 64), "c.bias": torch.zeros(64)}
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "onnx").mkdir()
    for name in ("pytorch_model.bin", "tokenizer.json", "onnx/model.onnx", "onnx/notes.txt"):
        (tmp_path / "plain" / name).write_bytes(b"{}")
    convert_folder(tmp_path / "plain", tmp_path / "sparse", format="sparse")
    copied = {path.relative_to(tmp_path / "sparse").as_posix() for path in (tmp_path / "sparse").rglob("*.*")}
    assert {"tokenizer.json", "onnx/notes.txt"} <= copied
    assert not copied & {"pytorch_model.bin", "onnx/model.onnx"}
    found = weights(tmp_path / "sparse")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    stored = compressed.SparseReader.of(open_folder(tmp_path / "sparse", (KIND,)))
    assert stored.is_compressed("a.weight") and not stored.is_compressed("b.weight")


def damaged(folder: Path, edit: Any) -> None:
    """Edit a weight file and make the manifest agree, so that only the content is wrong."""
    path = folder / "dsee_sparse.safetensors"
    edit(path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def sparse_folder(tmp_path: Path) -> Path:
    export_model(tuned(llama_config()), tmp_path / "sparse", format="sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    folder = sparse_folder(tmp_path)
    path = folder / "dsee_sparse.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(FormatError, match=r"dsee_sparse\.safetensors"):
        dsee_scale.load_pretrained(folder)
    damaged(folder, lambda path: None)
    with pytest.raises(FormatError, match=r"dsee_sparse\.safetensors"):
        dsee_scale.load_pretrained(folder)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_refused(tmp_path, place):
    folder = sparse_folder(tmp_path)
    path = folder / "dsee_sparse.safetensors"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    for read in (dsee_scale.load_pretrained, lambda f: convert_folder(f, tmp_path / "x", format="dense")):
        with pytest.raises(FormatError, match=r"dsee_sparse\.safetensors is damaged"):
            read(folder)


def test_an_unknown_version_is_refused(tmp_path):
    folder = sparse_folder(tmp_path)
    damaged(
        folder,
        lambda p: p.write_bytes(p.read_bytes().replace(b'"dsee_version": "1"', b'"dsee_version": "7"')),
    )
    with pytest.raises(FormatError, match="version '7', expected 1"):
        dsee_scale.load_pretrained(folder)


def test_settings_without_effect_are_refused(tmp_path, capsys):
    model = tuned(llama_config(), sparsity=0)
    with pytest.raises(ConfigError, match="no weight of the export is sparse"):
        export_model(model, tmp_path / "a", format="sparse")
    with pytest.raises(ConfigError, match="format 'small' is unknown; valid: dense, sparse"):
        export_model(model, tmp_path / "a", format="small")
    assert not (tmp_path / "a").exists()
    export_model(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="no weight of the export is sparse"):
        convert_folder(tmp_path / "a", tmp_path / "b", format="sparse")
    assert main(["export", str(tmp_path / "a"), "--output", str(tmp_path / "b"), "--delta", "dense"]) == 1
    assert "--delta goes with an adapter" in capsys.readouterr().err
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "b")]) == 1
    assert "--base FOLDER" in capsys.readouterr().err


def test_files_alone_give_the_same_sparse_files_as_the_live_model(tmp_path):
    from tests.models import build

    build(llama_config(), torch.bfloat16).save_pretrained(tmp_path / "base")
    model = tuned(llama_config(), dtype=torch.bfloat16)
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    live = export_model(model, tmp_path / "live", format="sparse")
    words = ["export", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--format", "sparse"]
    assert main([*words, "--output", str(tmp_path / "files"), "--json"]) == 0
    ours, theirs = weights(tmp_path / "live"), weights(tmp_path / "files")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(bits(ours[key]), bits(theirs[key])) for key in ours)
    assert live.format == "sparse"


def test_inspect_names_pattern_and_gain_of_a_sparse_folder(tmp_path, capsys):
    model = tuned(llama_config(), sparsity=0)
    dsee_scale.prune(model, PruneConfig(pattern="2:4", modules=("q_proj", "k_proj", "v_proj")))
    export_model(model, tmp_path / "sparse", format="sparse")
    assert main(["inspect", str(tmp_path / "sparse")]) == 0
    text = capsys.readouterr().out
    assert "2 x layers.self_attn.q_proj.weight" in text.replace("model.", "") or "q_proj.weight" in text
    assert "2:4" in text and "fit 2:4 kernels" in text and "as sparse files" in text
    assert "dsee_scale.load_pretrained" in text
