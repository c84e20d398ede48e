"""GPT-2 124M against transformers' GPT2LMHeadModel on the same random weights: logits, loss, gradients, ten steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pygpt import GPT, use_backend
from pygpt.ops import backends

BACKENDS = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")),
]


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.randint(50257, (2, 70), generator=torch.Generator().manual_seed(7))  # 69 tokens: no multiple of a tile
    return data[:, :-1].contiguous(), data[:, 1:].contiguous()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "ln_" in name:  # at their initial zeros and ones they would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.02)
    path = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(path)
    return path


def their_model(folder: Any) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


def steps(parameters: Any, loss_of: Any) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.1, fused=True)
    losses = []
    for _ in range(10):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reference(folder: Any, batch: Any) -> dict[str, Any]:
    idx, targets = batch
    model = their_model(folder)
    logits = model(idx).logits

    def loss_of() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())

    loss = loss_of()
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach(), "loss": loss.item(), "grads": grads, "steps": steps(model.parameters(), loss_of)}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpt2_124m_matches_transformers(folder, batch, reference, backend):
    idx, targets = batch
    with use_backend(backend):
        model = GPT.from_pretrained(folder)
        logits, loss = model(idx, targets, return_logits=True)
        loss.backward()
        assert relative(logits.detach(), reference["logits"]) < 1e-4
        assert loss.item() == pytest.approx(reference["loss"], rel=1e-4)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert found.keys() == reference["grads"].keys()
        for name, grad in found.items():
            theirs = reference["grads"][name]
            theirs = theirs if theirs.shape == grad.shape and "c_" not in name else theirs.t()  # Conv1D is transposed
            assert relative(grad, theirs) < 1e-4, name
        model.zero_grad()
        ours = steps(model.parameters(), lambda: model(idx, targets)[1])
    assert max(abs(a - b) for a, b in zip(ours, reference["steps"], strict=True)) < 1e-3
    assert ours[-1] < ours[0] - 1  # the ten steps did learn
