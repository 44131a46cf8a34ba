"""The Trainer of Hugging Face Transformers, on language models built from a configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fusedstep.functional as F
from clients.training import NATIVE, OUR_LOSS, OURS, SGD_OPTIONS, Kit, weights
from numerics import identical

VOCABULARY, LENGTH, SENTENCES = 101, 12, 32


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens, some of which have no label."""

    def __init__(self) -> None:
        self.tokens = torch.randint(VOCABULARY, (SENTENCES, LENGTH), device="cpu")
        self.labels = self.tokens.masked_fill(
            torch.rand(self.tokens.shape, device="cpu") < 0.2, -100
        )

    def __len__(self) -> int:
        return SENTENCES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def language_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )


def compute_loss(kit: Kit) -> Any:
    """The loss of the next token, over the number of tokens in all accumulated batches."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"][:, :-1].transpose(1, 2)  # (N, C, d1): no copy of the logits
        reduction = "mean" if num_items_in_batch is None else "sum"
        total: Tensor = kit.criterion(reduction=reduction)(logits, labels[:, 1:])
        return total if num_items_in_batch is None else total / num_items_in_batch

    return loss


def trainer(kit: Kit, model: GPT2LMHeadModel, data: Any, folder: Path, **options: Any) -> Trainer:
    model = copy.deepcopy(model)
    optimizer = kit.sgd(model.parameters(), **SGD_OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **{"max_steps": 6, "save_strategy": "no", "max_grad_norm": 1.0, **options},
    )
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        compute_loss_func=compute_loss(kit),
        optimizers=(optimizer, scheduler),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, {"bf16": True}],
    ids=str,
)
def test_options_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    """Our SGD ends at the bits of torch's, our loss beside it near those of torch's."""
    model, data = language_model(), Sentences()
    ended, losses = {}, {}
    for kit in (OURS, OUR_LOSS, NATIVE):
        run = trainer(kit, model, data, tmp_path, **options)
        losses[kit] = run.train().training_loss
        ended[kit] = weights(run.model)
    identical(ended[OURS], ended[OUR_LOSS])
    # A gradient that autocast rounds to 16 bits may go to either neighbour.
    near = {"rtol": 0.02, "atol": 2e-3} if "bf16" in options else {}
    torch.testing.assert_close(ended[OURS], ended[NATIVE], **near)
    assert losses[OURS] == pytest.approx(losses[NATIVE], rel=1e-3 if near else 1e-5)


@pytest.mark.parametrize(("first", "second"), [(OURS, NATIVE), (NATIVE, OURS)])
def test_a_checkpoint_is_continued_by_the_other(first: Kit, second: Kit, tmp_path: Path) -> None:
    model, data = language_model(), Sentences()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(first, model, data, tmp_path / "first", **saving).train()
    continued = trainer(second, model, data, tmp_path / "second")
    continued.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    whole = trainer(second, model, data, tmp_path / "whole")
    whole.train()
    torch.testing.assert_close(weights(continued.model), weights(whole.model))


def test_loss_of_the_model_itself(tmp_path: Path) -> None:
    """A model's own loss function may be ours too."""
    data = Sentences()
    batch = {name: torch.stack([data[i][name] for i in range(8)]) for name in data[0]}
    model = language_model().eval()
    expected = model(**batch).loss

    def ours(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])

    model.loss_function = ours
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    assert loss.grad_fn.name() == "CrossEntropyBackward0"
