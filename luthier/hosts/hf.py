"""A Run as parts of ``transformers.Trainer``: the same ingredients, their trainer.

run = luthier.begin(model, [LLRD(0.9), SWA(0.75)], learning_rate=2e-5, steps=1000)
parts = luthier.hosts.hf.parts(run, args)  # args: TrainingArguments with max_grad_norm=0, max_steps=1000
trainer = parts.Trainer(model, args, train_dataset=rows, optimizers=parts.optimizers, callbacks=parts.callbacks)
trainer.train()
run.finish()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from luthier.core.closure import Closure
from luthier.core.seeds import derive, remembered, reseed
from luthier.errors import ConflictError, Fault
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
        ConflictError: ``args`` clip gradients, smooth labels, make the noise of a NEFTune that the run has, accumulate where a step is
            replaced, or stop at another step; all told at once.
    """
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
    replaced = hasattr(run.optimizer, "offer")
    if replaced and args.gradient_accumulation_steps > 1:
        must = "must be 1, as the run replaces the step"
        faults.append(Fault("args.gradient_accumulation_steps", must, str(args.gradient_accumulation_steps)))
    if args.max_steps > 0 and args.max_steps != run.plan.steps:
        faults.append(Fault("args.max_steps", f"must be the run's {run.plan.steps}", str(args.max_steps)))
    if faults:
        raise ConflictError.of(faults, "TrainingArguments")

    class RunTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # the run's loss is a mean over one micro-batch's rows

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
                return run.offer(Closure(model, run.loss, [self._prepare_inputs(inputs)], before=before))
            finally:
                put_back()

    return Parts(RunTrainer, (run.optimizer, run.schedule), [_Keeper(run)])


class _Keeper(transformers.TrainerCallback):
    """Keeps the run's progress, and refuses to start what could not train what the plan says."""

    def __init__(self, run: Run) -> None:
        self._run = run

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
        if faults:
            raise ConflictError.of(faults, "transformers.Trainer")

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._run.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(float(loss))):
            control.should_training_stop = True
