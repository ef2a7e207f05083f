"""LoRA by PEFT on the same rows, arguments and model as `paper/run_glue.py`: `_peft_glue.py --flag value ...`.

Takes that program's flags. Of them, --apply_sparse, pruning and export have no effect.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, set_seed

from dsee_scale.training.setup import make_arguments
from paper.glue.arguments import parse_flags
from paper.glue.data import encode, load_glue
from paper.glue.metrics import compute_metrics, metric_of
from paper.glue.model import find_source, load_config, load_model, load_tokenizer
from paper.glue.run import dtype_of


def main(words: list[str]) -> None:
    settings = parse_flags(words)
    args = make_arguments(dict(settings.training))
    source = find_source(settings, None)
    data = load_glue(settings.data, ["train", "validation"], None)
    tokenizer = load_tokenizer(settings, source)
    config = load_config(settings, source, data.classes, tokenizer)
    classes = [config.id2label[index] for index in range(len(data.classes))]
    rows = encode(data, tokenizer, classes, length=settings.data.max_seq_length, pad=False)
    set_seed(args.seed)
    flags = settings.model
    lora = LoraConfig(
        r=flags.lora_r,
        lora_alpha=int(flags.lora_alpha),
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(load_model(settings, source, config, dtype_of(args)), lora)  # type: ignore[arg-type]
    trainer = Trainer(
        model=model,  # type: ignore[arg-type]
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        compute_metrics=compute_metrics(metric_of(data.task, regression=False), regression=False),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.model_accepts_loss_kwargs = False  # as in `paper.glue.run`
    trainer.train()
    metrics = trainer.evaluate()
    metrics["trained_in_updates"] = sum(
        getattr(p, "ds_numel", p.numel())
        for n, p in model.named_parameters()
        if "lora_" in n and p.requires_grad
    )
    Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
