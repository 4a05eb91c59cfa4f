"""What each process of the distributed tests runs: `torchrun --nproc-per-node 2 distributed_worker.py CASE FOLDER`."""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_checkpoint import small_model, small_processor  # noqa: E402
from training_samples import random_samples  # noqa: E402

from transformers_worldvla import WorldVLATrainer, WorldVLATrainingArguments  # noqa: E402
from transformers_worldvla.data import WorldVLADataCollator  # noqa: E402
from transformers_worldvla.loss_worldvla import loss_denominators  # noqa: E402
from transformers_worldvla.training.distributed import adapt_fsdp_plugin, fully_shard_model  # noqa: E402

NAMES = ("action_weight_sum", "world_weight_sum", "class_weight_sum", "label_count")
LEARNING_RATE = 1e-2


def whole_batch(processor: Any) -> dict[str, torch.Tensor]:
    """Two action and two world-model samples."""
    samples = random_samples(processor, count=1, steps=7)
    kinds = {sample["target_actions"] is not None for sample in (samples[0], samples[len(samples) - 1])}
    assert kinds == {True, False}
    return WorldVLADataCollator(processor)(
        [samples[0], samples[len(samples) - 1], samples[1], samples[len(samples) - 2]]
    )


def denominators(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sums = loss_denominators(
        batch["labels"][:, 1:],
        batch["loss_weights"][:, 1:],
        model.tokens.world_mask(batch["input_ids"])[:, 1:],
        model.authors_world_classes,
        model.config.world_loss_weight,
    )
    return dict(zip(NAMES, (sums.action, sums.world, sums.classes, sums.count), strict=True))


def own_rows(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rank, rows = dist.get_rank(), len(batch["input_ids"]) // dist.get_world_size()
    return {name: value[rank * rows : (rank + 1) * rows] for name, value in batch.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: Any, optimizer: Any, batch: dict[str, Any], sums: dict[str, Any], ranks: int) -> torch.Tensor:
    """One optimizer step; returns the loss over all ranks. Gradients stay."""
    optimizer.zero_grad()
    loss = model(**batch, **sums).loss
    (loss * ranks).backward()
    optimizer.step()
    loss = loss.detach().clone()
    if ranks > 1:
        dist.all_reduce(loss)
    return loss


def as_accelerate_does(model: Any, mp_policy: Any = None) -> Any:
    """The units that accelerate 1.15 makes of the same policy: embedding and [final norm, head] are units too."""
    options: dict[str, Any] = {
        "ignored_params": set(model.model.vqmodel.parameters()),
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
    }
    model.model.vqmodel.requires_grad_(False)
    for module in (*model.model.layers, model.get_input_embeddings()):
        fully_shard(module, **options)
    fully_shard([model.model.norm, model.get_output_embeddings()], reshard_after_forward=False, **options)
    fully_shard(model, **options)
    return model


def fsdp(folder: Path) -> None:
    """Sharded training is the training of one process: parameters, losses, gradients, saving and resuming."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = {"ours": lambda model: fully_shard_model(model, mesh), "accelerate": as_accelerate_does}
    processor = small_processor()
    batch = whole_batch(processor)
    for name, shard in shards.items():
        for chunk_size, checkpointing in ((2048, False), (5, False), (5, True)):
            fields = {"dropout": 0.0, "z_loss_weight": 0.01, "loss_chunk_size": chunk_size}
            reference = small_model(processor, **fields).train()
            reference.model.vqmodel.requires_grad_(False)
            model = copy.deepcopy(reference)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            shard(model)
            check_sharding(model)
            compare_steps(model, reference, batch, f"{name}, chunks of {chunk_size}, checkpointing {checkpointing}")
    save_and_resume(processor, batch, mesh, folder)
    half_precision_keeps_the_sums(processor, batch, mesh)


def check_sharding(model: Any) -> None:
    """Every parameter lies in parts on the ranks, except the image tokenizer's, which tokenizes as before."""
    for name, parameter in model.named_parameters():
        if ".vqmodel." in name:
            assert not isinstance(parameter, DTensor) and not parameter.requires_grad, name
            assert parameter.dtype == torch.float32, name
        else:
            assert isinstance(parameter, DTensor) and parameter.requires_grad, name
    local = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
    assert local <= 0.51 * total, (local, total)
    assert model.tokenize_images(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 4)


def compare_steps(model: Any, reference: Any, batch: dict[str, torch.Tensor], what: str) -> None:
    sums, ranks = denominators(reference, batch), dist.get_world_size()
    optimizers = [
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=LEARNING_RATE)
        for each in (reference, model)
    ]
    for number in range(2):
        expected = step(reference, optimizers[0], batch, {}, 1)
        actual = step(model, optimizers[1], own_rows(batch), sums, ranks)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=f"{what}, step {number}")
        if number == 0:
            gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert found.keys() == gradients.keys(), what
            for name, gradient in gradients.items():
                assert isinstance(found[name], DTensor)
                torch.testing.assert_close(
                    whole(found[name]), gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{what} {n}: {text}"
                )


def save_and_resume(processor: Any, batch: dict[str, torch.Tensor], mesh: Any, folder: Path) -> None:
    """Three steps, saved in shards after the first: a fresh model that loads them ends at the same weights."""
    sums, rows = None, own_rows(batch)

    def fresh(seed: int) -> tuple[Any, Any]:
        nonlocal sums
        model = small_model(processor, seed=seed, dropout=0.0).train()
        sums = denominators(model, batch)
        fully_shard_model(model, mesh)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def state(model: Any, optimizer: Any) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    model, optimizer = fresh(seed=0)
    step(model, optimizer, rows, sums, mesh.size())
    dcp.save(state(model, optimizer), checkpoint_id=folder / "sharded")
    losses = [step(model, optimizer, rows, sums, mesh.size()) for _ in range(2)]

    resumed, fresh_optimizer = fresh(seed=1)
    loaded = state(resumed, fresh_optimizer)
    dcp.load(loaded, checkpoint_id=folder / "sharded")
    set_state_dict(resumed, fresh_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert [step(resumed, fresh_optimizer, rows, sums, mesh.size()) for _ in range(2)] == losses
    for (name, one), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(whole(one), whole(other)), name
    dist.barrier()
    assert len(list((folder / "sharded").glob("*.distcp"))) == mesh.size(), "one file a rank"


def half_precision_keeps_the_sums(processor: Any, batch: dict[str, torch.Tensor], mesh: Any) -> None:
    """Computation in bfloat16 does not round what the loss is divided by, nor the loss."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    theirs = plugin.mixed_precision_policy
    adapt_fsdp_plugin(plugin, small_model(processor))
    shards = {
        "ours": lambda model: fully_shard_model(model, mesh, param_dtype=torch.bfloat16),
        "accelerate, policy replaced": lambda model: as_accelerate_does(model, plugin.mixed_precision_policy),
        "accelerate": lambda model: as_accelerate_does(model, theirs),
    }
    for name, shard in shards.items():
        model = small_model(processor, dropout=0.0, z_loss_weight=0.0).train()
        sums = denominators(model, batch)
        shard(model)
        larger = {key: value * 1.00123 for key, value in sums.items()}
        loss, smaller = (model(**own_rows(batch), **each).loss for each in (sums, larger))
        exact = abs(loss.item() / smaller.item() - 1.00123) < 1e-6
        assert exact == (name != "accelerate"), (name, loss, smaller)
        (loss * mesh.size()).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def ddp(folder: Path) -> None:
    """Three steps of the real Trainer; the first rank writes losses and weights. Also run as one process."""
    processor = small_processor()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = WorldVLATrainingArguments(
        output_dir=str(folder / f"run{ranks}"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // ranks,
        learning_rate=LEARNING_RATE,
        z_loss_weight=0.01,
        dropout=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    samples = random_samples(processor, count=2, steps=8)
    model = small_model(processor)
    trainer = WorldVLATrainer(model, arguments, processing_class=processor, train_dataset=samples)
    trainer.train()
    assert trainer.accelerator.num_processes == ranks
    wrapped = type(trainer.model_wrapped).__name__
    assert wrapped == ("DistributedDataParallel" if ranks > 1 else "WorldVLAForCausalLM"), wrapped
    if trainer.is_world_process_zero():
        torch.save(model.state_dict(), folder / f"weights{ranks}.pt")
        (folder / f"log{ranks}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    case, target = sys.argv[1], Path(sys.argv[2])
    if case == "fsdp":
        dist.init_process_group("gloo")
        fsdp(target)
        dist.destroy_process_group()
    else:
        ddp(target)
        if dist.is_initialized():
            dist.destroy_process_group()
