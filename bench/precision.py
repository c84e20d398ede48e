"""Does a training run in bfloat16 follow the one in float32? Same initial weights, same batches of real text.

    python bench/precision.py              # 200 steps of a GPT with 4 layers, C 128, on Python's standard library

bfloat16 is what pygpt trains in: weights and gradients in bfloat16, float32 masters in the optimizer, float32 accumulation
in the kernels. The aim is a loss within 1% of float32's at every step.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.ops import backends
from pygpt.optim import build_optimizer, clip_factor, cosine_with_warmup


def real_text(characters: int) -> str:
    """The beginning of the standard library's source, file after file."""
    parts: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        if sum(map(len, parts)) >= characters:
            break
    return "".join(parts)[:characters]


def losses(dtype: torch.dtype, config: GPTConfig, tokens: Tensor, batch: int, steps: int, peak: float) -> Tensor:
    """Training loss of every step, (steps,) float64: a function of dtype alone, for one machine and config."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    optimizer = build_optimizer(model, weight_decay=0.1, learning_rate=peak)
    draw = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        offsets = torch.randint(len(tokens) - config.block_size, (batch, 1), generator=draw)
        window = tokens[offsets + torch.arange(config.block_size + 1)]
        for group in optimizer.param_groups:
            group["lr"] = cosine_with_warmup(step, peak=peak, minimum=peak / 10, warmup=steps // 10, total=steps)
        loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        optimizer.step(grad_factor=clip_factor(model.parameters(), 1.0)[1])
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("steps", 200), ("layers", 4), ("width", 128), ("block", 128), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    backends.tune_allocator()
    tokens = torch.tensor(get_tokenizer("gpt2").encode(real_text(2_000_000)))
    config = GPTConfig(
        n_layer=options.layers, n_head=max(1, options.width // 64), n_embd=options.width, block_size=options.block
    )
    runs = [
        losses(dtype, config, tokens, options.batch, options.steps, options.learning_rate)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    away = runs[1] / runs[0] - 1
    print(f"{options}\n{len(tokens):,} tokens; kernels: {backends.backends()['causal_attention']['cpu']}")
    for step in sorted({0, *range(19, options.steps, 20), options.steps - 1}):
        print(f"step {step + 1:4}: float32 {runs[0][step]:.4f}  bfloat16 {runs[1][step]:.4f}  {away[step]:+.3%}")
    print(f"largest difference {away.abs().max():.3%}, mean {away.mean():+.4%}")


if __name__ == "__main__":
    main()
