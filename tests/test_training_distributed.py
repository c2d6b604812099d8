"""Two gloo processes against one with the same global batch, and the oracle's two-rank rebalancing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from anyflow_runtime.training import (
    FlowMapConfig,
    GlobalBatch,
    assign_buckets,
    draw_num_chunks,
    draw_rollout,
    flow_map_loss,
    pair_times,
    rebalance,
)
from anyflow_runtime.training.distributed import all_reduce_sum, broadcast_values, draw_integer, draw_uniform

ORACLE = json.loads((Path(__file__).parent / "data" / "training.json").read_text())["rebalance"]["two_ranks"]
WORLD = 2


def velocity(weight):
    return lambda x, t, r, text: weight * torch.sin(x) + (t - 0.5 * r).view(*t.shape, 1, 1, 1) / 1000


def global_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    u = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    return {"x0": x0, "noise": noise, "u1": u[0], "u2": u[1]}


def loss_and_gradient(rank: int, world: int) -> tuple[float, float]:
    """Of this rank's part of the global batch of 4."""
    batch, local = global_batch(), 4 // world
    part = {name: value[rank * local : (rank + 1) * local] for name, value in batch.items()}
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    times = pair_times(part["u1"], part["u2"], assign_buckets(GlobalBatch(local, rank, world)))
    config = FlowMapConfig(guidance=None, text_dropout=0.0)
    text = torch.zeros(local, 1, 1)
    result = flow_map_loss(velocity(weight), part["x0"], text, times, config, noise=part["noise"])
    result.loss.backward()
    return result.loss.item(), weight.grad.item()


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    try:
        case = ORACLE[f"rank{rank}"]
        scaled = rebalance(torch.tensor(case["l"], dtype=torch.float64), torch.tensor(case["D"]))
        generator = torch.Generator().manual_seed(100 + rank)  # ranks would differ if they drew for themselves
        draws = [draw_num_chunks(8, generator=generator) for _ in range(8)]
        draws += [draw_rollout(generator=generator).num_steps for _ in range(8)]
        loss, gradient = loss_and_gradient(rank, WORLD)
        result = {
            "rebalanced": scaled.mean().item(),
            "draws": draws,
            "next": torch.rand(1, generator=generator).item(),
            "sum": all_reduce_sum(torch.tensor([1.0 + rank])).item(),
            "loss": loss,
            "gradient": gradient,
        }
        Path(directory, f"{rank}.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("gloo")
    mp.spawn(worker, args=(str(directory),), nprocs=WORLD)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_rebalancing_uses_the_mean_of_all_ranks(ranks) -> None:
    """Rank 1 holds no diffusion sample, rank 0 nothing else: both join the collective and get the oracle's loss."""
    assert [r["rebalanced"] for r in ranks] == pytest.approx(ORACLE["rank_losses"], rel=1e-12)


def test_two_ranks_train_as_one_process_with_the_same_global_batch(ranks) -> None:
    loss, gradient = loss_and_gradient(0, 1)
    assert sum(r["loss"] for r in ranks) / WORLD == pytest.approx(loss, rel=1e-12)
    assert sum(r["gradient"] for r in ranks) / WORLD == pytest.approx(gradient, rel=1e-12)


def test_shared_decisions_come_from_rank_zero(ranks) -> None:
    assert ranks[0]["draws"] == ranks[1]["draws"] and len(set(ranks[0]["draws"])) > 2


def test_shared_draws_advance_every_generator_equally(ranks) -> None:
    """A rank whose generator stood still would repeat its numbers after a resume."""
    for rank, result in enumerate(ranks):
        generator = torch.Generator().manual_seed(100 + rank)
        draws = 8 * 1 + 8 * 2  # (coin, u) at once; N, then g
        for i in range(draws):
            torch.rand(2 if i < 8 else 1, generator=generator, dtype=torch.float64)
        assert torch.rand(1, generator=generator).item() == result["next"]


def test_sum_over_ranks(ranks) -> None:
    assert [r["sum"] for r in ranks] == [3.0, 3.0]


def test_helpers_work_without_a_process_group() -> None:
    assert broadcast_values((1.0, 2.5)) == (1.0, 2.5)
    assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0
    values = {draw_integer(3, 5, torch.Generator().manual_seed(seed)) for seed in range(50)}
    assert values == {3, 4, 5}
    with pytest.raises(ValueError, match="count: got 0"):
        draw_uniform(0)
    with pytest.raises(ValueError, match="high: got 2"):
        draw_integer(3, 2)
