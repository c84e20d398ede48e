"""The gradient of the table that embedding and head share, whichever way a training loop asks for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from common import assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pygpt import GPT, GPTConfig, nn, ops
from pygpt.errors import PygptError
from pygpt.ops import backends

V, C = 5000, 16  # of which the 48 tokens of a batch make enough logits for the fused head
CONFIG = GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=C)
IDX = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(0)) % 40 * 100  # some tokens several times
TARGETS = IDX.roll(-1, 1)
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


def make(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).to(dtype)


def loss_of(model: GPT, idx: Tensor = IDX) -> Tensor:
    return model(idx, TARGETS)[1]


def parameters(model: GPT) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: GPT) -> list[Tensor]:
    return [p.grad for p in parameters(model) if p.grad is not None]


# --- ways to ask: each returns all that it got ---


def once(model: GPT) -> list[Tensor]:
    loss_of(model).backward()
    return gradients(model)


def scaled(model: GPT) -> list[Tensor]:
    (loss_of(model) * 3).backward()
    return gradients(model)


def twice_through_one_graph(model: GPT) -> list[Tensor]:
    loss = loss_of(model)
    results = [torch.autograd.grad(loss, parameters(model), retain_graph=keep) for keep in (True, True, False)]
    return [grad for result in results for grad in result]


def backward_twice_through_one_graph(model: GPT) -> list[Tensor]:
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = [grad.clone() for grad in gradients(model)]
    loss.backward()
    return first + gradients(model)


def some_inputs_first(model: GPT) -> list[Tensor]:
    hidden: list[Tensor] = []
    hook = model.transformer.h[1].register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    loss = loss_of(model)
    hook.remove()
    table, positions = model.transformer.wte.weight, model.transformer.wpe.weight
    asked = [[hidden[0]], [positions], [table], [table, positions], [model.transformer.ln_f.weight]]
    results = [grad for inputs in asked for grad in torch.autograd.grad(loss, inputs, retain_graph=True)]
    loss.backward()
    return results + gradients(model)


def one_input_only(model: GPT) -> list[Tensor]:
    table = model.transformer.wte.weight
    (grad,) = torch.autograd.grad(loss_of(model), table)
    torch.autograd.grad(loss_of(model), model.transformer.ln_f.weight)
    loss_of(model).backward(inputs=[table])
    return [grad, *gradients(model), *torch.autograd.grad(loss_of(model), parameters(model))]


def detached_embedding(model: GPT) -> list[Tensor]:
    model.transformer.wte.register_forward_hook(lambda _, __, out: out.detach())
    return once(model)


def embedding_alone(model: GPT) -> list[Tensor]:
    tied: list[Tensor] = []
    model.transformer(IDX, tied=tied).square().sum().backward()
    return gradients(model)


def frozen_table(model: GPT) -> list[Tensor]:
    model.transformer.wte.weight.requires_grad_(False)
    return once(model)


def frozen_positions(model: GPT) -> list[Tensor]:
    model.transformer.wpe.weight.requires_grad_(False)
    return once(model)


def last_block_alone(model: GPT) -> list[Tensor]:
    model.requires_grad_(False).transformer.h[-1].requires_grad_(True)
    return once(model)


def untied(model: GPT) -> list[Tensor]:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return once(model)


def accumulated(model: GPT) -> list[Tensor]:
    loss_of(model, IDX.flip(0)).backward()
    return once(model)


def several_graphs(model: GPT) -> list[Tensor]:
    losses = [loss_of(model, idx) for idx in (IDX, IDX.flip(0), IDX.flip(1), IDX + 7)]
    losses[1].backward()
    losses[0].backward()
    (losses[3] * 2 + losses[2]).backward()
    return gradients(model)


def with_logits(model: GPT) -> list[Tensor]:
    logits, loss = model(IDX, TARGETS, return_logits=True)
    (loss + logits.square().mean()).backward()
    return gradients(model)


def documents(model: GPT) -> list[Tensor]:
    model(IDX, TARGETS, document_start=torch.tensor([0] * 5 + [5] * 11).int().expand(3, 16))[1].backward()
    return gradients(model)


def checkpointed(model: GPT, use_reentrant: bool) -> list[Tensor]:
    one = torch.ones((), requires_grad=True)
    loss = checkpoint(lambda factor: loss_of(model) * factor, one, use_reentrant=use_reentrant)
    (loss * 2).backward()
    return gradients(model)


def checkpointed_reentrant(model: GPT) -> list[Tensor]:
    return checkpointed(model, True)


def checkpointed_not_reentrant(model: GPT) -> list[Tensor]:
    return checkpointed(model, False)


def checkpointed_blocks(model: GPT) -> list[Tensor]:
    for block in model.transformer.h:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=True)
    return once(model)


def packed(model: GPT) -> list[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: [x], lambda x: x[0]):
        loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def hooks(model: GPT) -> list[Tensor]:
    seen: list[Tensor] = []
    table = model.transformer.wte.weight
    table.register_hook(lambda grad: seen.append(grad.clone()))
    table.register_hook(lambda grad: grad * 2)
    table.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.transformer.wte.register_full_backward_hook(lambda _, __, out: seen.append(out[0].clone()))
    with warnings.catch_warnings():  # about a module whose inputs have no gradients
        warnings.simplefilter("ignore")
        once(model)
    assert len(seen) == 3
    return seen + gradients(model)


def functional(model: GPT) -> list[Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(model, {name: p * 2 for name, p in leaves.items()}, (IDX, TARGETS))[1]
    return list(torch.autograd.grad(loss, list(leaves.values())))


def functional_transform(model: GPT) -> list[Tensor]:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (IDX, TARGETS))[1]

    return list(torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()}).values())


def not_contiguous(model: GPT) -> list[Tensor]:
    # What F.linear's backward gives: the model's own head below 65,536 logits.
    idx = IDX[:1, :4]
    model(idx, idx)[1].backward()
    return gradients(model)


WAYS: list[Callable[[GPT], list[Tensor]]] = [
    once, scaled, twice_through_one_graph, backward_twice_through_one_graph, some_inputs_first, one_input_only,
    detached_embedding, embedding_alone, frozen_table, frozen_positions, last_block_alone, untied, accumulated,
    several_graphs, with_logits, documents, checkpointed_reentrant, checkpointed_not_reentrant, checkpointed_blocks,
    packed, hooks, functional, functional_transform, not_contiguous,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_equals_eager(way):
    model = make()
    expected = copy.deepcopy(model).double()
    grads = way(model)
    with backends.use_backend("eager"):
        exact = way(expected)
    assert len(grads) == len(exact) > 0
    for grad, reference in zip(grads, exact, strict=True):
        assert_close(grad, reference)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_bfloat16_equals_two_gradients_added_by_autograd(way, monkeypatch):
    grads = way(make(torch.bfloat16))
    monkeypatch.setattr(nn, "tied_embedding", lambda idx, table, *rest: (ops.embedding(idx, table, *rest), table))
    expected = way(make(torch.bfloat16))
    assert len(grads) == len(expected) > 0
    for grad, reference in zip(grads, expected, strict=True):
        assert_close(grad, reference)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_makes_no_second_gradient_of_the_table(dtype):
    """Nor adds or copies one: what the head made becomes the parameter's `grad`."""
    model = make(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss_of(model).backward()
    names = {event.name for event in profile.events()}
    on_tables = {event.name for event in profile.events() if [V, C] in event.input_shapes}
    assert "pygpt::embedding_backward_" in on_tables
    assert "pygpt::embedding_backward" not in names
    assert not on_tables & {"aten::add", "aten::add_", "aten::clone", "aten::copy_"}, on_tables


@pytest.mark.parametrize("retain_graph", [True, False])
def test_second_derivative_is_an_error(retain_graph):
    model = make()
    grads = torch.autograd.grad(loss_of(model), parameters(model), create_graph=True, retain_graph=retain_graph)
    for grad, reference in zip(grads, once(make()), strict=True):
        assert_close(grad, reference)
    if backends.extension is not None:
        with pytest.raises(PygptError, match="no second derivative"):
            sum(grad.square().sum() for grad in grads).backward()


def test_a_table_changed_between_forward_and_backward_is_an_error():
    model = make()
    loss = loss_of(model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_a_freed_graph_is_an_error():
    loss = loss_of(make())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "transformer"])
def test_compiled(whole):
    model, expected = make(), once(make())
    if whole:
        torch.compile(model, fullgraph=True, backend="aot_eager")(IDX, TARGETS)[1].backward()
    else:
        model.transformer.compile(fullgraph=True, backend="aot_eager")
        once(model)
    for grad, reference in zip(gradients(model), expected, strict=True):
        assert_close(grad, reference)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("as_view", [True, False])
def test_distributed_data_parallel(process_group, as_view):
    model, expected, fired = make(), make(), []
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    for _ in range(2):
        parallel(IDX, TARGETS)[1].backward()
        loss_of(expected).backward()
    assert sorted(fired) == sorted(2 * [name for name, _ in model.named_parameters()])
    for grad, reference in zip(gradients(model), gradients(expected), strict=True):
        assert_close(grad, reference)
