"""A Run as parts of ``transformers.Trainer``: the same ingredients, their trainer.

run = luthier.begin(model, [LLRD(0.9), SWA(0.75)], learning_rate=2e-5, steps=1000)
parts = luthier.hosts.hf.parts(run, args)  # args: TrainingArguments with max_grad_norm=0, max_steps=1000
trainer = parts.Trainer(model, args, train_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks)
trainer.train()
run.finish()

``trainer.train(resume_from_checkpoint=...)`` goes on to the bits of a Trainer that never stopped: model, run, parts and trainer are made
as at first, and ``luthier.pt`` in the Trainer's checkpoint holds what the Trainer knows nothing of.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from luthier.core.claims import Place
from luthier.core.closure import Closure
from luthier.core.seeds import derive, remembered, reseed
from luthier.errors import ConflictError, Fault
from luthier.hosts import saved
from luthier.jsonfile import atomically
from luthier.run import Run


@dataclass(frozen=True)
class Parts:
    """What a ``transformers.Trainer`` is given.

    Args:
        Trainer: a subclass of ``transformers.Trainer`` whose loss and step are the run's.
        optimizers: (optimizer, scheduler), its ``optimizers`` argument.
        callbacks: its ``callbacks`` argument; they keep the run's progress.
    """

    Trainer: type[transformers.Trainer]
    optimizers: tuple[Optimizer, LRScheduler]
    callbacks: list[transformers.TrainerCallback]


def parts(run: Run, args: transformers.TrainingArguments) -> Parts:
    """The parts of a Trainer that trains as ``run`` says.

    Args:
        run: what ``luthier.begin`` made; it holds model, optimizer, schedule and loss.
        args: the Trainer's own arguments, which must not do again, or otherwise, what the run does.
    Raises:
        ConflictError: ``args`` clip gradients, smooth labels, make the noise of a NEFTune that the run has, accumulate or scale gradients
            where a step is replaced, have several processes where weights rest or several GPUs in one, or stop at another step; all told at
            once.
    """
    if faults := _faults(run, args):
        raise ConflictError.of(faults, "TrainingArguments")

    replaced = _replaces(run)
    keeper = _Keeper(run)

    class RunTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # the run's loss is a mean over one micro-batch's rows

        def train(
            self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
        ) -> TrainOutput:
            if resume_from_checkpoint is True:  # without any, the Trainer says so
                resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
            named = isinstance(resume_from_checkpoint, (str, os.PathLike))
            keeper.saved = saved.read(run, Path(resume_from_checkpoint)) if named else None
            try:
                trained: TrainOutput = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
                return trained
            except _Ended:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                self.is_in_train = False
                return TrainOutput(self.state.global_step, 0.0, {})

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if model.training:
                run.train()
                loss = run.loss(model, inputs)
                return (loss, None) if return_outputs else loss
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            if not replaced:
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
                return loss
            model.train()
            run.train()

            def before(number: int) -> None:  # as often as the step evaluates, with the same dropout
                run.begin_part(number)
                seed = derive(run.seed, "dropout", run.progress.step, number, args.process_index)
                reseed(seed, args.device)

            put_back = remembered([args.device])
            try:
                batch = self._prepare_inputs(inputs)
                return run.offer(Closure(model, run.loss, [batch], before=before, together=self._together))
            finally:
                put_back()

        def _together(self, loss: Tensor) -> Tensor:
            """The mean over processes of a scalar, so that all of them take the same step."""
            mean: Tensor = self.accelerator.reduce(loss, reduction="mean")
            return mean

    return Parts(RunTrainer, (run.optimizer, run.schedule), [keeper])


def _faults(run: Run, args: transformers.TrainingArguments) -> list[Fault]:
    """What ``args`` would do again, or otherwise than the run."""
    faults = []
    if args.max_grad_norm:
        faults.append(
            Fault(
                "args.max_grad_norm",
                "must be 0, as it would clip before the run's own gradient ingredients",
                str(args.max_grad_norm),
                f"Put Clip({args.max_grad_norm}) among the ingredients.",
            )
        )
    if args.label_smoothing_factor:
        must, do = "must be 0, as the run's own loss takes its place", "Put LabelSmoothing among the ingredients."
        faults.append(Fault("args.label_smoothing_factor", must, str(args.label_smoothing_factor), do))
    if args.neftune_noise_alpha and any(entry.name == "neftune" for entry in run.plan.entries):
        must = "must be None, as the run's neftune makes noise already"
        faults.append(Fault("args.neftune_noise_alpha", must, str(args.neftune_noise_alpha)))
    replaced = _replaces(run)
    if replaced and args.gradient_accumulation_steps > 1:
        must = "must be 1, as the run replaces the step"
        faults.append(Fault("args.gradient_accumulation_steps", must, str(args.gradient_accumulation_steps)))
    half = args.fp16 or getattr(args, "mixed_precision", "") == "fp16"  # the latter by accelerate's launcher
    if replaced and half:
        must = "must be off, as the run replaces the step and the Trainer's gradient scaler does not see it"
        faults.append(Fault("args.fp16", must, "fp16", "Take bf16=True, or single precision."))
    if args.world_size > 1 and run._resting and not _forward_only(run):
        must = "must be 1, as weights that wake later would learn on each process by itself"
        got = f"{args.world_size}, and {len(run._resting)} weights rest, such as {run._resting[0].name}"
        faults.append(Fault("args.world_size", must, got, "Drop what lets them rest (thaw, lisa)."))
    if args.n_gpu > 1:
        must = "must be 1, as the Trainer would copy the model to each GPU in every step"
        do = "Start a process for each GPU (torchrun), or set CUDA_VISIBLE_DEVICES=0."
        faults.append(Fault("args.n_gpu", must, str(args.n_gpu), do))
    if args.max_steps > 0 and args.max_steps != run.plan.steps:
        faults.append(Fault("args.max_steps", f"must be the run's {run.plan.steps}", str(args.max_steps)))
    return faults


def _replaces(run: Run) -> bool:
    """Whether an ingredient has a step of its own in the place of backward pass and optimizer step."""
    return hasattr(run.optimizer, "offer")


def _forward_only(run: Run) -> bool:
    """Whether an ingredient does away with gradients (MeZO), so that processes share none."""
    claims = [claim for entry in run.plan.entries for claim in entry.claims]
    return any(claim.how == "voids" and claim.place == Place.GRADIENT for claim in claims)


class _Ended(Exception):
    """The checkpoint that was loaded is of the stage's end; the Trainer itself would take a step more."""


class _Keeper(transformers.TrainerCallback):
    """Keeps the run's progress, saves and loads it, and refuses to start what could not train what the plan says.

    Attributes:
        saved: what the run goes on from, until the Trainer has loaded all else; None when it trains from the start.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.saved: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        run = self._run
        faults = []
        if state.max_steps != run.plan.steps:
            faults.append(Fault("the Trainer's steps", f"must be the run's {run.plan.steps}", str(state.max_steps)))
        held = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
        loose = [
            name for name, weight in run.model.named_parameters() if weight.requires_grad and id(weight) not in held
        ]
        if loose:
            do = "Begin the run after the model is as it will be trained."
            faults.append(
                Fault(
                    "the optimizer", "must hold every trainable weight", f"{len(loose)} missing, such as {loose[0]}", do
                )
            )
        if run.progress.step:
            do = "Begin it anew, on the model as it was at first, also to go on from a checkpoint."
            faults.append(Fault("the run", "must have taken no step before train()", f"{run.progress.step} steps", do))
        step = self.saved["step"] if self.saved else 0
        if step != state.global_step:
            do = "Let parts.Trainer go on from a checkpoint that it has saved."
            faults.append(Fault("the Trainer", f"must go on at the run's step {step}", f"step {state.global_step}", do))
        if faults:
            raise ConflictError.of(faults, "transformers.Trainer")
        if self.saved:
            saved.load(run, self.saved)
            self.saved = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._run.progress.over or self._run.progress.step >= self._run.plan.steps:
            raise _Ended

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        run = self._run
        run.advance()
        if run.progress.over:
            run.notes.append(f"ended after step {run.progress.step} of {run.plan.steps}: {run.progress.over}")
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.should_save and not args.save_only_model:
            path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / saved.STATE
            atomically(path, lambda beside: torch.save(saved.saved(self._run), beside))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(float(loss))):
            control.should_training_stop = True
