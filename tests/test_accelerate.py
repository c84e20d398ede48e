"""pygpt.accelerate: somebody else's model computes the same before and after, through pygpt's ops."""

from __future__ import annotations

import pytest
import torch
from common import assert_close
from torch import nn

import pygpt
from pygpt import ops


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of pygpt's ops in the order they were called."""
    seen: list[str] = []

    def record(name):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, **k: (seen.append(name), original(*a, **k))[1])

    for name in ("embedding", "layer_norm", "causal_attention", "causal_attention_qkvpacked", "linear"):
        record(name)
    return seen


def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=32)).eval()


def test_hugging_face_model(calls):
    model = hugging_face()
    idx = torch.randint(60, (2, 20))

    def run():
        model.zero_grad()
        out = model(idx, labels=idx)
        out.loss.backward()
        return out.logits.detach(), model.transformer.wte.weight.grad.clone()

    logits, grad = run()
    assert not calls
    assert pygpt.accelerate(model) is model
    new_logits, new_grad = run()
    assert calls.count("layer_norm") == 5
    assert calls.count("causal_attention") == 2
    assert calls.count("embedding") == 2
    assert calls.count("linear") == 2 * 4 + 1
    assert_close(new_logits, logits.double(), torch.float32)
    assert_close(new_grad, grad.double(), torch.float32)


def test_hugging_face_generate_and_padding(calls):
    plain, fast = hugging_face(), pygpt.accelerate(hugging_face())
    idx = torch.randint(60, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(idx, **options), plain.generate(idx, **options))
    assert "causal_attention" in calls
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding: transformers' own SDPA answers
    a, b = fast(idx, attention_mask=mask).logits, plain(idx, attention_mask=mask).logits
    assert_close(a[0, 2:], b[0, 2:].double(), torch.float32)
    assert_close(a[1], b[1].double(), torch.float32)


class CausalSelfAttention(nn.Module):
    """The attributes of nanoGPT's module, with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.dropout = 2, 16, 0.0
        self.c_attn, self.c_proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, 2, 8).transpose(1, 2) for t in self.c_attn(x).split(16, dim=2))
        scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        return self.resid_dropout(self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)))


def test_nanogpt_style_model(calls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.LayerNorm(16), CausalSelfAttention(), nn.LayerNorm(16, bias=False))
    idx = torch.randint(11, (3, 9))
    before, state = model(idx).detach(), model.state_dict()
    pygpt.accelerate(model)
    assert_close(model(idx), before.double(), torch.float32)
    assert calls == ["embedding", "layer_norm", "linear", "causal_attention_qkvpacked", "linear", "layer_norm"]
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model[2], CausalSelfAttention)


def test_nothing_to_swap():
    with pytest.raises(ValueError, match="nothing in Conv2d"):
        pygpt.accelerate(nn.Conv2d(2, 2, 1))


def test_modules_it_does_not_understand_are_left_alone(calls):
    model = nn.ModuleList([nn.LayerNorm((2, 4)), nn.Embedding(5, 4, max_norm=1.0), nn.LayerNorm(4)])
    pygpt.accelerate(model)
    assert [type(m) is c for m, c in zip(model, (nn.LayerNorm, nn.Embedding, nn.LayerNorm), strict=True)] == [
        True,
        True,
        False,
    ]
