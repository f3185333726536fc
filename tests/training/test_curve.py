"""Losses of `finetune` at each step, compared with a training loop of transformers and PEFT."""

import math

import numpy as np
import pytest
import torch

from keras_gemma import GemmaCausalLM
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.training import chat_dataset, finetune
from tests.configurations import GEMMA2
from tests.models import compile_lm
from tests.parity.pairs import make_ours, make_theirs

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # raised inside PEFT
)

PAIRS = [{"prompt": f"to be {i}", "completion": f"or not {i % 3}"} for i in range(10)]
STEPS, WARMUP, PEAK, DECAY = 50, 5, 1e-2, 0.1


def their_losses(adapter, batches):
    model = peft.PeftModel.from_pretrained(make_theirs(GEMMA2), adapter, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=DECAY, eps=1e-7)
    losses = []
    for step, (x, y, weights) in enumerate(batches):
        rate = step / WARMUP
        if step >= WARMUP:
            rate = 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))
        optimizer.param_groups[0]["lr"] = PEAK * rate
        ids, mask, y = (torch.from_numpy(a).long() for a in (*x.values(), y))
        logits = model(input_ids=ids, attention_mask=mask).logits
        each = torch.nn.functional.cross_entropy(logits.mT, y, reduction="none")
        weights = torch.from_numpy(weights)
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_match_peft(tokenizer, tmp_path):
    lm = GemmaCausalLM(make_ours(GEMMA2), GemmaCausalLMPreprocessor(tokenizer, 64))
    compile_lm(lm)
    lm.enable_lora(rank=4, targets="all-linear", seed=0)
    lm.save_lora(tmp_path / "before")
    data = chat_dataset(PAIRS, tokenizer, 32, packing=False, batch_size=2)
    settings = {"steps": STEPS, "warmup": WARMUP / STEPS, "learning_rate": PEAK}
    result = finetune(lm, data, tmp_path / "run", weight_decay=DECAY, verbose=False, **settings)
    batches = []
    for epoch in range(STEPS // len(data)):
        data.epoch = epoch
        batches += list(data)
    losses, expected = result.log.column("loss")[1], their_losses(tmp_path / "before", batches)
    assert len(losses) == STEPS and expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
