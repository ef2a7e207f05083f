"""Texts for the prompts of a test file, in the files that the challenges' scorers read.

    python paper/run_generation.py --model RUN/model --data_file test.csv --prompt "{mr} ||" --completion " {ref}" \
        --output_dir RUN/texts [--num_beams 5 --length_penalty 0.9 --no_repeat_ngram_size 4 --max_new_tokens 64]

`--recipe paper/recipes/e2e.yaml` takes templates, lengths and `generate`'s arguments from a recipe; flags win over
it. Start it with torchrun to share the prompts among processes. `--adapter FOLDER` puts a saved
adapter into the model first.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dsee_scale import load_adapter, load_pretrained
from dsee_scale.data.encoding import Encoder
from dsee_scale.data.rows import read_file, template_columns
from dsee_scale.errors import ConfigError, DSEEError
from dsee_scale.evaluation.evaluate import generate_texts
from dsee_scale.recipe.recipe import read_with_base
from dsee_scale.recipe.sections import DataConfig, ModelConfig
from dsee_scale.training.setup import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # `paper` is not installed

from paper.scorer_files import write_scorer_files

GENERATION = {"num_beams": int, "length_penalty": float, "no_repeat_ngram_size": int, "max_new_tokens": int}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="exported folder, or hub id")
    parser.add_argument("--adapter", help="saved adapter of that model")
    parser.add_argument("--data_file", required=True, help=".csv, .json, ... with the prompts' columns")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--recipe", help="take templates and settings from its data section")
    parser.add_argument("--prompt", help='template, e.g. "{mr} ||"')
    parser.add_argument("--completion", help='template of a reference, e.g. " {ref}"')
    parser.add_argument("--max_length", type=int, help="tokens of a prompt at most")
    parser.add_argument("--max_samples", type=int, help="take the first so many different prompts")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    for name, kind in GENERATION.items():
        parser.add_argument(f"--{name}", type=kind)
    return parser.parse_args(argv)


def data_config(flags: argparse.Namespace) -> DataConfig:
    section = dict(read_with_base(Path(flags.recipe)).get("data", {})) if flags.recipe else {}
    section = {
        key: section[key] for key in ("prompt", "completion", "max_length", "generation") if key in section
    }
    section |= {k: v for k in ("prompt", "completion", "max_length") if (v := getattr(flags, k)) is not None}
    if not section.get("prompt") or not section.get("completion"):
        raise ConfigError("give --recipe, or --prompt and --completion")
    own = {name: value for name in GENERATION if (value := getattr(flags, name)) is not None}
    section["generation"] = {**section.get("generation", {}), **own}
    return DataConfig(task="completion", train_file=flags.data_file, **section)


def run(flags: argparse.Namespace) -> None:
    config = data_config(flags)
    rows = read_file(flags.data_file)
    wanted = template_columns(str(config.prompt)) + template_columns(str(config.completion))
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{flags.data_file} has no column {missing[0]!r}; columns found: {', '.join(rows.column_names)}"
        )
    tokenizer = load_tokenizer(ModelConfig(name=flags.model))
    items = Encoder(tokenizer, config).generations(rows, flags.max_samples or len(rows))
    device = own_device()
    dtype = getattr(torch, flags.dtype) if flags.dtype else None
    model = load_model(flags.model, dtype)
    if flags.adapter:
        load_adapter(model, flags.adapter)
    model.to(device).eval()
    prompts, arguments = [item.prompt for item in items], dict(config.generation)
    texts = generate_texts(
        model, tokenizer, prompts, arguments, pad_id=int(tokenizer.pad_token_id), batch_size=flags.batch_size,
        device=device,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        shown = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts]
        found = write_scorer_files(Path(flags.output_dir), shown, texts, [item.references for item in items])
        sys.stdout.write(
            f"BLEU {found['bleu']:.2f} on {found['prompts']} prompts; files in {flags.output_dir}\n"
        )


def own_device() -> torch.device:
    """This process's GPU, made the current one: what NCCL gathers goes through it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def load_model(name: str, dtype: torch.dtype | None) -> torch.nn.Module:
    if (Path(name) / "config.json").is_file():
        return load_pretrained(name, dtype=dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=False)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    flags = parse([word for word in argv if not word.startswith(("--local_rank", "--local-rank"))])
    own_device()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(flags)
    except DSEEError as error:
        logging.getLogger("dsee_scale").error("%s: %s", type(error).__name__, error)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
