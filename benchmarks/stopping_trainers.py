"""Early stopping in the trainers of Lightning and Transformers, resumed from their checkpoints on disk."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from stopping_job import Job, Marked, Outcome, Scores, needs_no, number, parts
from torch.utils.data import DataLoader, TensorDataset

ONE = torch.zeros(1, 1)


def lightning(scores: Scores, job: Job) -> Outcome:
    import pytorch_lightning as pl

    needs_no(job, "rel_delta", "warmup", "keep", policies=("bad", "stop"))
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.heard = Marked(), 0

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0]).sum() * 0.0

        def on_train_epoch_end(self) -> None:
            self.heard = self.current_epoch
            self.net.mark(self.heard)
            if (score := scores[self.heard]) is not None:
                self.log(job.name, score)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    settings: dict[str, Any] = {"min_delta": job.rule.min_delta, "stopping_threshold": job.rule.target}
    settings |= {"mode": job.rule.mode} if job.told else {}
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        saved = None
        for start, part, now in parts(scores, job):
            stops = [pl.callbacks.EarlyStopping(job.name, patience=p, **settings) for p in now.patiences]
            length: dict[str, Any] = {"max_epochs": start + len(part), "min_epochs": job.least or None}
            trainer: Any = pl.Trainer(accelerator="cpu", devices=1, callbacks=[*stops], **length, **quiet)
            module = Module()
            trainer.fit(module, DataLoader(TensorDataset(ONE)), ckpt_path=saved)
            saved = f"{folder}/last.ckpt"
            trainer.save_checkpoint(saved)
    return Outcome(module.heard if trainer.should_stop else None, number(stops[0].best_score, job.rule), module.net.marked)


def hugging_face(scores: Scores, job: Job) -> Outcome:
    import transformers

    needs_no(job, "rel_delta", "target")
    hf: Any = transformers
    hf.logging.set_verbosity_error()
    heard = 0

    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(
            folder,
            eval_strategy="epoch",
            save_strategy="epoch" if job.keep or job.resume else "no",
            load_best_model_at_end=job.keep,
            metric_for_best_model=job.name,
            greater_is_better=job.rule.mode == "max" if job.told else None,
            eval_delay=max(job.rule.warmup, job.least),
            restore_callback_states_from_checkpoint=True,
            learning_rate=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        saved = None
        for start, part, now in parts(scores, job):
            stops = [hf.EarlyStoppingCallback(p, job.rule.min_delta) for p in now.patiences]
            data: Any = [{"x": ONE[0], "labels": ONE[0]}]
            trainer = hf.Trainer(Marked(), args, train_dataset=data, eval_dataset=data, callbacks=stops)

            def evaluate(ignore_keys: Any = None, trainer: Any = trainer, **others: Any) -> dict[str, float | None]:
                nonlocal heard
                heard = round(trainer.state.epoch) - 1
                trainer.model.mark(heard)
                metrics = {} if scores[heard] is None else {f"eval_{job.name}": scores[heard]}
                trainer.control = trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
                return metrics

            trainer.evaluate = evaluate
            trainer.remove_callback(hf.PrinterCallback)
            args.num_train_epochs = start + len(part)
            trainer.train(resume_from_checkpoint=saved)
            saved = f"{folder}/checkpoint-{trainer.state.global_step}"
        stopped = heard < len(scores) - 1
        return Outcome(heard if stopped else None, number(trainer.state.best_metric, job.rule), trainer.model.marked)
