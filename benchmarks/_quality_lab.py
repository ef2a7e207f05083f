"""What a cell of benchmarks/quality.py needs: models, batches, training steps, and how the result is judged."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _quality_jobs import CALIBRATION, EVALUATION, METRIC, RATE, Job, load_job
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import dsee_scale
from dsee_scale.data.encoding import collator
from dsee_scale.evaluation.evaluate import Tally, evaluate, generate_texts
from dsee_scale.passes.label_logits import label_loss, logits_at, predicting, select_logits
from dsee_scale.recipe.parsing import cache_folder
from dsee_scale.training.timeline import RETUNE_FACTOR


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """What every script with a `Lab` is asked; `settle` puts in what wasn't said."""
    arguments.add_argument("--model", default=str(cache_folder() / "smollm2-135m-instruct"))
    arguments.add_argument("--job", choices=list(METRIC), default="sentiment")
    arguments.add_argument("--files", type=Path, nargs="+", help="the job's data, see quality.py")
    arguments.add_argument("--steps", type=int, default=30, help="of tune")
    arguments.add_argument("--retune_steps", type=int, default=60)
    arguments.add_argument("--rate", type=float, help="highest learning rate; default: the job's")
    arguments.add_argument(
        "--num_calibration", type=int, help="training rows that a pruning looks at; default: the job's"
    )
    arguments.add_argument("--num_eval", type=int, help="held-out rows; default: the job's")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--output", default="runs/quality", help="for models on the way")


def settle(args: argparse.Namespace, quick_blocks: int = 2) -> bool:
    """The job's defaults, and what `--quick` changes; whether the model is there."""
    if args.quick:
        args.steps, args.retune_steps, args.num_eval, args.num_calibration = 1, 1, 16, 16
        args.output += "-quick"
    args.rate = args.rate or RATE[args.job]
    args.num_calibration = args.num_calibration or CALIBRATION[args.job]
    args.num_eval = args.num_eval or EVALUATION[args.job]
    args.trained_norms = getattr(args, "trained_norms", False)
    if args.files is None:
        args.files = [cache_folder() / "movie-sentiment" / f"{part}.csv" for part in ("train", "validation")]
    if not Path(args.model).is_dir():
        print(f"{args.model} is missing; run python examples/demo/demo_inputs.py", file=sys.stderr)
        return False
    if args.quick:
        args.model = shortened(args.model, Path(args.output) / "shortened", quick_blocks)
    return True


def shortened(model: str, folder: Path, blocks: int) -> str:
    """A folder with a model's first blocks alone."""
    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=blocks, dtype="auto").save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


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
        values = {name: getattr(self.args, name) for name in names}
        values |= {"torch": torch.__version__.split("+")[0], "masters": "float32"}
        return values | {"norms": "trained" if self.args.trained_norms else "frozen"}

    def base(self) -> nn.Module:
        """The untuned model, on a CPU without the flash attention, whose backward in bfloat16 is slow there."""
        attention = "eager" if self.device.type == "cpu" else None
        model = AutoModelForCausalLM.from_pretrained(
            self.args.model, dtype=torch.bfloat16, attn_implementation=attention
        )
        return model.to(self.device)

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

    def judge_by_unseen(self, seed: int) -> None:
        """From now on judge by the training rows that no row of this seed trained on or was calibrated with."""
        size = self.job.batch_size
        steps = self.args.steps + self.args.retune_steps
        seen = {
            *self._order(seed)[: steps * size],
            *self._order(1000 + seed)[: 2 * self.args.num_calibration],
        }
        unseen = [row for row in range(len(self.job.train)) if row not in seen]
        self.job = dataclasses.replace(self.job, evaluation=self.job.judged_by(unseen))

    def _order(self, seed: int) -> list[int]:
        """Rows as the first of `batches` come."""
        order: list[int] = torch.randperm(
            len(self.job.train), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        return order

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Training batches of a seed without end, the same for every row."""
        generator, size = torch.Generator().manual_seed(seed), self.job.batch_size
        while True:
            order = torch.randperm(len(self.job.train), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                rows = [self.job.train[index] for index in order[start : start + size]]
                yield {key: value.to(self.device) for key, value in self.collate(rows).items()}

    def calibration(self, seed: int, times: int = 1) -> list[dict[str, Tensor]]:
        """Training batches that a pruning looks at; so many times the job's number of them."""
        source = self.batches(1000 + seed)
        return [next(source) for _ in range(-(-times * self.args.num_calibration // self.job.batch_size))]

    def train(
        self,
        model: nn.Module,
        batches: Iterator[dict[str, Tensor]],
        steps: int,
        *,
        done: int = 0,
        moments: dict[str, Any] | None = None,
        teacher: nn.Module | None = None,
        top: int = 0,
        factor: float = RETUNE_FACTOR,
        warmup: float = 0.0,
    ) -> dict[str, Any]:
        """AdamW for so many steps, after those that are done.

        One schedule over tune and retune, as in a recipe: a tenth of warm-up, then a linear decay to zero, at
        `factor` times the rate after the prune, which rises from zero once more over a share `warmup` of the steps.
        The optimizer's moments go on across the prune. With a teacher, half of the loss is the Kullback-Leibler
        divergence from its predictions, as far as its `top` highest logits tell them.

        Returns:
            The optimizer's state after these steps.
        """
        module = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
        module = getattr(module, "model", module) if hasattr(model, "peft_config") else module
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.args.rate, weight_decay=0.0)
        dsee_scale.keep_masters(optimizer)
        if moments is not None:
            optimizer.load_state_dict(moments)
        total = self.args.steps + self.args.retune_steps
        factors = get_scheduler("linear", optimizer, math.ceil(0.1 * total), total).lr_lambdas[0]
        model.train()
        for step in range(steps):
            rate = factors(done + step)
            if done:
                rate = min(1.0, factor * rate) * min(1.0, (step + 1) / max(1.0, warmup * steps))
            optimizer.param_groups[0]["lr"] = self.args.rate * rate
            batch = next(batches)
            logits = logits_of(model, module, batch)
            loss = label_loss(logits, batch["labels"], None)
            if teacher is not None:
                with torch.no_grad():
                    wanted = logits_of(teacher.eval(), teacher, batch)
                loss = 0.5 * loss + 0.5 * divergence(logits, wanted, batch["labels"], top)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()


def logits_of(model: nn.Module, inner: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits where a label is to be predicted."""
    with logits_at(inner, predicting(batch["labels"])):
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def divergence(logits: Tensor, wanted: Tensor, labels: Tensor, top: int) -> Tensor:
    """Kullback-Leibler divergence from the predictions by the `top` highest wanted logits, mean over labels."""
    found, aim = (select_logits(each, predicting(labels)) for each in (logits, wanted))
    highest, tokens = aim.topk(top, dim=-1)
    found = found.log_softmax(-1).gather(-1, tokens)
    return nn.functional.kl_div(found, highest.log_softmax(-1), log_target=True, reduction="batchmean")


def trained_share(model: nn.Module) -> float:
    """Trained parameters over all of the model's own."""
    own = sum(
        p.numel() for name, p in model.named_parameters() if "dsee_" not in name and "lora_" not in name
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / own


def judged(lab: Lab, folder: Path) -> dict[str, Any]:
    """An exported folder in stock transformers, and what its files lack of the untuned model's block weights.

    `zeros` is the share of their entries that are zero, or gone because heads or neurons were cut out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(lab.device)
    kept, entries = _block_entries(folder)[0], _block_entries(Path(lab.args.model))[1]
    return {"exported": lab.quality(model, texts=True), "zeros": 1 - kept / entries}


def _block_entries(folder: Path) -> tuple[int, int]:
    """How many entries of the block weights in a folder's files are not zero, and how many there are."""
    kept = entries = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".layers." in name and (tensor := file.get_tensor(name)).dim() == 2:
                    kept, entries = kept + int(tensor.count_nonzero()), entries + tensor.numel()
    return kept, entries
