"""What pruning costs in quality: SmolLM2-135M tuned, pruned, retuned and exported, beside its peers.

    python examples/demo/demo_inputs.py
    python benchmarks/quality.py --job sentiment [--seeds 1 2 3] [--rows "dense LoRA" "ours, 50%"]
    python benchmarks/quality.py --job e2e --files devset.csv
    python benchmarks/quality.py --job text --files train.txt test.txt
    python benchmarks/quality.py --cells benchmarks/quality_cells --plot docs/quality.png    # measures nothing

Every row of a seed starts from the same weights and batches and gets as many steps in all as dense LoRA (PEFT), at
most 1% of the parameters trained: rank 4 on all linear layers and the norms. The tuned start of a seed is shared.
Each finished cell is kept in --cells, so the script may be stopped and goes on; those that the docs' tables are of are
in benchmarks/quality_cells. With --plot it draws what is there and prints its tables.
Exported models are judged in stock transformers, zeros are counted in their files. One process, any device.
Rows of llm-compressor's are there where it is installed (pip install llmcompressor).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.data.encoding import collator
from dsee_scale.evaluation.evaluate import Tally, evaluate, generate_texts
from dsee_scale.passes.label_logits import label_loss, logits_at, predicting
from dsee_scale.passes.pools import block_linears
from dsee_scale.recipe.parsing import cache_folder
from dsee_scale.training.timeline import RETUNE_FACTOR

sys.path.insert(0, str(Path(__file__).parent))
from _quality_jobs import CALIBRATION, METRIC, METRIC_WORDS, RATE, Job, load_job
from _quality_report import print_table, print_tables, save_plot
from _report import Report, parser

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 32
HALF = {"sparsity": 0.5, "block_steps": 64}
UNITS = [{"pattern": "heads", "num_per_layer": 3}, {"pattern": "neurons", "num_per_layer": 384}]
OURS: dict[str, tuple[int | float | None, Any]] = {
    "ours, 50%": (64, HALF),
    "ours, 2:4": (64, {"pattern": "2:4", "block_steps": 96}),
    "ours, 60%": (64, {"sparsity": 0.6, "block_steps": 64}),
    "ours, 70%": (64, {"sparsity": 0.7, "block_steps": 96}),
    "ours, 50% without S2": (None, HALF),
    "ours, 50%, N = 0.1%": (0.001, HALF),
    "ours, 50%, every matrix alike": (64, {**HALF, "scope": "matrix"}),
    "ours, 50%, without block steps": (64, {"sparsity": 0.5}),
    "ours, 2:4, without block steps": (64, {"pattern": "2:4"}),
    "ours, 50%, wanda alone": (64, {"sparsity": 0.5, "refit": False}),
    "ours, a third of the heads, a quarter of the neurons": (64, UNITS),
    "magnitude, 50%, update beside the mask": (64, {"sparsity": 0.5, "score": "W", "mask_update": False}),
}
COMPRESSOR = {
    "llm-compressor's Wanda then LoRA, 50%": "WandaPruningModifier",
    "llm-compressor's SparseGPT then LoRA, 50%": "SparseGPTModifier",
}
PEERS = ("dense LoRA", "wanda then LoRA, 50%", *(COMPRESSOR if find_spec("llmcompressor") else ()))


class Lab:
    """One job with its model folder: everything that a cell needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.output = Path(args.output) / args.job
        self.output.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.job: Job = load_job(args.job, self.tokenizer, args.files, self.output, args.num_eval)
        self.collate = collator(self.tokenizer)
        self.device = torch.device(args.device)

    def settings(self) -> dict[str, Any]:
        """What a cell's numbers depend on beside its row and seed."""
        names = ("steps", "retune_steps", "rate", "num_calibration", "num_eval")
        return {name: getattr(self.args, name) for name in names} | {"torch": torch.__version__.split("+")[0]}

    def base(self) -> nn.Module:
        """The untuned model."""
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.bfloat16).to(self.device)

    def quality(self, model: nn.Module, texts: bool = False) -> dict[str, float]:
        """The job's metrics; BLEU where texts are wanted."""
        tally = evaluate(model, model, self.job.evaluation, batch_size=16, device=self.device)
        if texts and (wanted := self.job.evaluation.generations):
            found = generate_texts(
                model,
                self.tokenizer,
                [item.prompt for item in wanted],
                dict(self.job.generation),
                pad_id=self.job.evaluation.pad_id,
                batch_size=16,
                device=self.device,
            )
            tally += Tally(hypotheses=found, references=[item.references for item in wanted])
        return tally.metrics()

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Training batches of a seed without end, the same for every row."""
        generator, size = torch.Generator().manual_seed(seed), self.job.batch_size
        while True:
            order = torch.randperm(len(self.job.train), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                rows = [self.job.train[index] for index in order[start : start + size]]
                yield {key: value.to(self.device) for key, value in self.collate(rows).items()}

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """Training batches that a pruning looks at."""
        source = self.batches(1000 + seed)
        return [next(source) for _ in range(-(-self.args.num_calibration // self.job.batch_size))]

    def train(
        self,
        model: nn.Module,
        batches: Iterator[dict[str, Tensor]],
        steps: int,
        *,
        done: int = 0,
        moments: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """AdamW for so many steps, after those that are done.

        One schedule over tune and retune, as in a recipe: a tenth of warm-up, then a linear decay to zero, at twice
        the rate after the prune. The optimizer's moments go on across the prune.

        Returns:
            The optimizer's state after these steps.
        """
        module = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
        module = getattr(module, "model", module) if hasattr(model, "peft_config") else module
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.args.rate, weight_decay=0.0)
        if moments is not None:
            optimizer.load_state_dict(moments)
        total = self.args.steps + self.args.retune_steps
        factors = get_scheduler("linear", optimizer, math.ceil(0.1 * total), total).lr_lambdas[0]
        model.train()
        for step in range(steps):
            factor = factors(done + step)
            if done:
                factor = min(1.0, RETUNE_FACTOR * factor)
            optimizer.param_groups[0]["lr"] = self.args.rate * factor
            batch = next(batches)
            with logits_at(module, predicting(batch["labels"])):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            label_loss(logits, batch["labels"], None).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()


def ours(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """Tune (or take the tuned start), prune, retune, export."""
    (num_sparse, settings), steps = OURS[row], lab.args.steps
    config = DSEEConfig(
        rank=RANK,
        alpha=ALPHA,
        num_sparse=num_sparse,
        target_modules=LINEARS,
        trained_modules=("*norm",),
        seed=seed,
    )
    tuned = lab.output / "tuned" / f"N={num_sparse}, seed {seed}"
    model, source = lab.base(), lab.batches(seed)
    optimizer = tuned.with_name(f"{tuned.name}.pt")
    if optimizer.is_file():
        dsee_scale.load_adapter(model, tuned)
        moments = torch.load(optimizer)
        for _ in range(steps):
            next(source)
    else:
        dsee_scale.inject(model, config)
        moments = lab.train(model, source, steps)
        dsee_scale.save_adapter(model, tuned, overwrite=True)
        torch.save(moments, optimizer)
    found = {"tuned": lab.quality(model), "trained_share": trained_share(model)}
    prunings = settings if isinstance(settings, list) else [settings]
    dsee_scale.prune(model, [PruneConfig(**each) for each in prunings], lab.calibration(seed))
    found["pruned"] = lab.quality(model)
    lab.train(model, source, lab.args.retune_steps, done=steps, moments=moments)
    found["retuned"] = lab.quality(model)
    folder = lab.output / "exported, ours"
    dsee_scale.export_model(model, folder, tokenizer=lab.tokenizer, overwrite=True)
    return found | judged(lab, folder)


def dense_lora(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """PEFT, as many steps in all, nothing pruned."""
    return _peft(lab, lab.base(), seed, masked=False)


def pruned_then_lora(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """Prune the untuned model, tune it by PEFT with as many steps in all, merge under the mask."""
    model, batches = lab.base(), lab.calibration(seed)
    if row in COMPRESSOR:
        _compress(model, batches, COMPRESSOR[row])
    else:
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, refit=False), batches)
    return {"pruned": lab.quality(model)} | _peft(lab, model, seed, masked=True)


def _compress(model: nn.Module, batches: list[dict[str, Tensor]], modifier: str) -> None:
    """One modifier of llm-compressor on the block weights, from the same rows, one at a time so that none is padded."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers import pruning

    rows = [
        {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    settings = {"sparsity": 0.5, "mask_structure": "0:0", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    loader, recipe = DataLoader(rows, batch_size=None), getattr(pruning, modifier)(**settings)  # type: ignore[arg-type]
    oneshot(model=model, dataset=loader, recipe=recipe, pipeline="sequential", clear_sparse_session=True)


def _peft(lab: Lab, model: nn.Module, seed: int, *, masked: bool) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    masks = {name: layer.weight != 0 for name, layer in block_linears(model).items()} if masked else {}
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS))
    tuned = get_peft_model(model, lora)  # type: ignore[arg-type]
    for name, param in tuned.named_parameters():
        param.requires_grad_(param.requires_grad or "norm" in name)
    share = trained_share(tuned)
    lab.train(tuned, lab.batches(seed), lab.args.steps + lab.args.retune_steps)
    found: dict[str, Any] = {"retuned": lab.quality(tuned.base_model.model), "trained_share": share}
    merged = tuned.merge_and_unload()
    if masked:
        found["merged densely"] = lab.quality(merged)
        for name, keep in masks.items():
            merged.get_submodule(name).weight.data.mul_(keep)
    folder = lab.output / "exported, peer"
    merged.save_pretrained(folder)
    return found | judged(lab, folder)


def trained_share(model: nn.Module) -> float:
    """Trained parameters over all of the model's own."""
    own = sum(
        p.numel() for name, p in model.named_parameters() if "dsee_" not in name and "lora_" not in name
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / own


def judged(lab: Lab, folder: Path) -> dict[str, Any]:
    """An exported folder in stock transformers, and the zeros in its files' block weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(lab.device)
    zeros = entries = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".layers." in name and (tensor := file.get_tensor(name)).dim() == 2:
                    zeros, entries = zeros + int((tensor == 0).sum()), entries + tensor.numel()
    return {"exported": lab.quality(model, texts=True), "zeros": zeros / entries}


def cell(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """A finished cell, measured now if it is not there yet."""
    path, settings = lab.args.cells / lab.args.job / f"{row}, seed {seed}.json", lab.settings()
    if path.is_file():
        known = json.loads(path.read_text())
        if known["settings"] != settings:
            sys.exit(
                f"quality: {path} was measured with {known['settings']}, not {settings}: choose other --cells"
            )
        return known
    measure: Callable[[Lab, str, int], dict[str, Any]]
    measure = dense_lora if row == "dense LoRA" else ours if row in OURS else pruned_then_lora
    started = time.perf_counter()
    found = measure(lab, row, seed) | {"seconds": time.perf_counter() - started, "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1))
    partial.rename(path)
    return found


def main() -> None:
    """Measure what is missing, print all."""
    cache = cache_folder()
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(cache / "smollm2-135m-instruct"))
    arguments.add_argument("--job", choices=list(METRIC), default="sentiment")
    arguments.add_argument("--files", type=Path, nargs="+", help="the job's data, see above")
    arguments.add_argument("--rows", nargs="+", default=[*PEERS, *OURS], choices=[*PEERS, *OURS])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments.add_argument("--steps", type=int, default=30, help="of tune")
    arguments.add_argument("--retune_steps", type=int, default=60)
    arguments.add_argument("--rate", type=float, help="highest learning rate; default: the job's")
    arguments.add_argument(
        "--num_calibration", type=int, help="training rows that a pruning looks at; default: the job's"
    )
    arguments.add_argument("--num_eval", type=int, default=400)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--output", default="runs/quality", help="for models on the way")
    arguments.add_argument(
        "--cells", type=Path, help="for the finished cells' numbers; default: OUTPUT/cells"
    )
    arguments.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw and print all jobs' finished cells; no more"
    )
    args = arguments.parse_args()
    if args.quick:
        args.steps, args.retune_steps, args.num_eval, args.num_calibration = 1, 1, 16, 16
        args.rows, args.output = ["dense LoRA", "ours, 50%"], args.output + "-quick"
    args.cells = args.cells or Path(args.output) / "cells"
    if args.plot:
        print_tables(args.cells)
        save_plot(args.cells, args.plot)
        return
    args.rate = args.rate or RATE[args.job]
    args.num_calibration = args.num_calibration or CALIBRATION[args.job]
    if args.files is None:
        args.files = [cache / "movie-sentiment" / f"{part}.csv" for part in ("train", "validation")]
    if not Path(args.model).is_dir():
        print(f"quality: {args.model} is missing; run python examples/demo/demo_inputs.py", file=sys.stderr)
        return
    lab, report = Lab(args), Report("quality", args.json)
    cells = {row: [cell(lab, row, seed) for seed in args.seeds] for row in args.rows}
    metric, words = METRIC[args.job], METRIC_WORDS[args.job]
    peer = [one["exported"][metric] for one in cells.get("dense LoRA", [])]
    for row, found in cells.items():
        value = statistics.mean(one["exported"][metric] for one in found)
        report.add(f"{args.job}: {row}", words, "", value, statistics.mean(peer) if peer else None)
    if not args.json:
        print_table(args.job, cells)


if __name__ == "__main__":
    main()
