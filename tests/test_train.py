"""`hf-prune train`: the methods against their definitions, the loop against a kill, the command as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_prune import assets, cli, masks, networks, phases, train, training, training_data, training_recipe
from hf_prune.pattern import Pattern
from hf_prune.training_data import Data
from hf_prune.training_recipe import Training

METHODS = ("lomp", "imp", "rare-gems", "smart-ratio")


def settings(method: str, *, sets: tuple[str, ...] = (), **flags: Any) -> Training:
    """A run of seconds on the digits."""
    given = {"method": method, "network": "mlpnet", "dataset": "digits", "epochs": 2, "batch_size": 50, "samples": 300}
    if method == "lomp":
        sets = ("lomp.grid=[1e-2,1e-3]", *sets)
    return training_recipe.resolve(None, flags={**given, **flags}, sets=sets)


@pytest.fixture(scope="module")
def digits() -> Data:
    return training_data.load(settings("dense"))


def perform(chosen: Training, data: Data, network: nn.Module | None = None, **more: Any) -> tuple[nn.Module, Any]:
    network = network or networks.build(chosen.network, data.image, len(data.names), chosen.seed)
    return network, training.train(network, data, chosen, Accelerator(cpu=True), **more)


def small() -> nn.Module:
    """Batch norm and dropout: state and random numbers that a resumed run must not lose."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ exact sparsity
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.9, 0.973])
def test_exactly_the_sparsity_that_was_asked_for(digits: Data, method: str, sparsity: float) -> None:
    sets = ("imp.rewind=0", "imp.share=0.5") if method == "imp" else ()
    network, found = perform(settings(method, sparsity=sparsity, epochs=1, sets=sets), digits)
    weights = [p for p in network.parameters() if p.dim() == 2]
    total = sum(w.numel() for w in weights)
    assert sum(int((w != 0).sum()) for w in weights) == math.floor((1 - sparsity) * total + 1e-9)
    assert all(bool((w != 0).any()) for w in weights), "no layer may lose all"
    zeros = torch.cat([w.detach().flatten() for w in weights])
    assert not bool(torch.signbit(zeros[zeros == 0]).any()), "zeros are stored as +0.0"


@pytest.mark.parametrize("method", ["lomp", "imp", "rare-gems"])
@pytest.mark.parametrize("nm", ["2:4", "1:4"])
def test_every_group_keeps_n_of_m(digits: Data, method: str, nm: str) -> None:
    network, found = perform(settings(method, nm=nm, epochs=2), digits)
    n, m = map(int, nm.split(":"))
    for weight in (p for p in network.parameters() if p.dim() == 2):
        groups = (weight != 0).view(-1, m).sum(1)
        assert bool((groups == n).all())
    assert found.prunable.dense == {}


def test_groups_lie_along_input_channels(digits: Data) -> None:
    conv = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    chosen = settings("lomp", nm="2:4", epochs=1, sets=("lomp.l1=1e-4",))
    network, found = perform(chosen, digits, conv)
    assert "divisible by 4, found 1" in found.prunable.dense["0.weight"]
    assert bool((network[0].weight != 0).all()), "what the pattern does not fit stays dense"
    weight = network[2].weight  # (4, 8, 3, 3)
    groups = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
    assert bool((groups == 2).all())


# ------------------------------------------------------------------------------------------------------------- LOMP
def test_proximal_step_is_the_closed_form() -> None:
    """argmin over w of (w - v)²/2 + a|w|, found by trying every w of a fine grid."""
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    values = torch.tensor([-2.0, -0.301, -0.3, -0.1, 0.0, 0.2, 0.299, 0.31, 1.5], dtype=torch.float64)
    best = torch.stack([grid[((grid - v) ** 2 / 2 + 0.3 * grid.abs()).argmin()] for v in values])
    stepped = values.clone()
    masks.soften([stepped], 0.3)
    torch.testing.assert_close(stepped, best, atol=1e-9, rtol=0)
    assert int((stepped == 0).sum()) == 5


def test_penalty_has_the_gradient_of_the_sum_of_magnitudes() -> None:
    w = torch.tensor([[1.5, -2.0], [0.0, 0.25]], dtype=torch.float64, requires_grad=True)
    masks.penalty([w]).backward()
    assert masks.penalty([w]).item() == pytest.approx(3.75)
    assert w.grad is not None and w.grad.tolist() == [[1.0, -1.0], [0.0, 1.0]]


def test_a_proximal_run_zeroes_weights_before_the_threshold(digits: Data) -> None:
    seen: list[float] = []
    chosen = settings("lomp", sparsity=0.9, epochs=3, lr=0.05, sets=("lomp.l1=0.5", "lomp.proximal=true"))
    network = networks.build("mlpnet", digits.image, 10)

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "done" and event["index"] == 0:
            seen.append(float((network[1].weight == 0).float().mean()))

    perform(chosen, digits, network, tell=tell)
    assert seen[0] > 0.3


def test_auto_takes_the_largest_tolerated_penalty() -> None:
    options, goal = phases.Lomp(grid=(1e-4, 1e-2, 1e-3), eps=0.1), Pattern(sparsity=0.9, scope="model")

    def done(loss: float) -> dict[str, Any]:
        return {"validation_loss": loss, "train_loss_spread": 0.02, "pruned": False, "l1": 1e-4}

    tried: list[dict[str, Any]] = [done(0.3)]
    weights = []
    for loss in (0.9, 0.351, 0.349):
        phase = phases.lomp(options, goal, 5, tried)
        assert phase is not None and phase.start == "initial" and phase.prune is None
        weights.append(phase.l1)
        tried.append(done(loss))
    assert weights == [1e-2, 1e-3, 1e-4], "from the largest down"
    last = phases.lomp(options, goal, 5, tried)
    assert last is not None and last.prune == goal and last.start == "here" and last.epochs == 0
    assert phases.lomp(options, goal, 5, [*tried, {**done(0), "pruned": True}]) is None
    # none tolerated: back to the network without penalty, not to the last one tried
    none = phases.lomp(options, goal, 5, [done(0.3), done(0.9), done(0.9), done(0.9)])
    assert none is not None and none.start == "early" and none.prune == goal and none.l1 == 0
    # eps auto is the spread of the dense training loss
    spread = dataclasses.replace(options, eps="auto")
    assert phases.tolerated(spread, done(0.3), done(0.309)) and not phases.tolerated(spread, done(0.3), done(0.311))


def test_auto_by_result_takes_the_penalty_that_is_best_under_the_threshold(digits: Data) -> None:
    chosen = settings("lomp", sparsity=0.7, epochs=6, sets=("lomp.choose=pruned", "lomp.grid=[3e-2,3e-3,3e-4]"))
    network, found = perform(chosen, digits)
    trials = {record["l1"]: record["trial_loss"] for record in found.history[:-1]}
    assert len(trials) == 4 and found.history[-1]["l1"] == min(trials, key=trials.__getitem__)
    # the network is the one that was tried, to the bit
    assert found.validation["loss"] == trials[found.history[-1]["l1"]]


def test_lomp_thresholds_the_network_it_trained(digits: Data) -> None:
    """The weights that stay are exactly those of the penalised training: nothing is trained after the threshold."""
    chosen = settings("lomp", sparsity=0.9, sets=("lomp.l1=1e-3",))
    network = networks.build("mlpnet", digits.image, 10)
    trained: dict[str, Tensor] = {}

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "done" and event["index"] == 0:
            trained.update({k: v.clone() for k, v in network.state_dict().items()})

    perform(chosen, digits, network, tell=tell)
    every = torch.cat([v.flatten().abs() for k, v in trained.items() if v.dim() == 2])
    cut = every.sort(descending=True).values[math.floor(0.1 * every.numel() + 1e-9) - 1]
    for name, value in network.state_dict().items():
        wanted = trained[name] * (trained[name].abs() >= cut) if value.dim() == 2 else trained[name]
        assert torch.equal(value, wanted)


# -------------------------------------------------------------------------------------------------------------- IMP
def test_imp_rewinds_kept_weights_to_the_early_ones(digits: Data) -> None:
    network = small()
    early: dict[str, Tensor] = {}
    rounds = 0

    def tell(event: Mapping[str, Any]) -> None:
        nonlocal rounds
        if event["event"] == "done" and event["index"] == 0:
            early.update({k: v.clone() for k, v in network.state_dict().items()})
        elif event["event"] == "phase" and event["index"] >= 2:
            rounds += 1
            for name, value in network.state_dict().items():
                kept = value != 0 if name in ("0.weight", "6.weight", "8.weight") else torch.ones_like(value).bool()
                assert torch.equal(value[kept], early[name][kept]), name
                assert bool(kept.all()) == (name not in ("6.weight", "0.weight", "8.weight")) or name == "0.weight"

    chosen = settings("imp", sparsity=0.7, epochs=2, sets=("imp.rewind=1", "imp.share=0.4"))
    _, found = perform(chosen, digits, network, tell=tell)
    assert rounds == 3 and len(found.history) == 5
    assert any(not torch.equal(v, early[k]) for k, v in network.state_dict().items()), "the last round trains"


def test_imp_rounds_shrink_by_the_share_and_meet_every_stop() -> None:
    goal = Pattern(sparsity=0.95, scope="model")
    levels = [p.sparsity for p in phases.rounds(phases.Imp(share=0.2, through=(0.5, 0.9, 0.99)), goal)]
    assert levels[:3] == pytest.approx([0.2, 0.36, 0.488])
    assert levels[3] == 0.5 and 0.9 in levels and levels[-1] == 0.95 and 0.99 not in levels
    for before, after in zip(levels, levels[1:], strict=False):
        assert before < after and 1 - after >= 0.8 * (1 - before) - 1e-9
    pairs = [(p.n, p.m) for p in phases.rounds(phases.Imp(), Pattern(n=2, m=4))]
    assert pairs == [(3, 4), (2, 4)]


def test_masks_only_shrink() -> None:
    torch.manual_seed(0)
    network, images = small(), torch.randn(2, 1, 8, 8)
    weights = masks.prunable(network, images, None)
    values = {name: p.detach() for name, p in network.named_parameters()}
    first = masks.by_size(weights, values, masks.full(weights, values), Pattern(sparsity=0.5, scope="model"))
    for name in weights.names:  # what is gone grows large again, what is kept is zero: still it must not come back
        values[name].copy_(torch.where(first[name], 0.0, 9.0))
    second = masks.by_size(weights, values, first, Pattern(sparsity=0.8, scope="model"))
    assert masks.kept(second) == math.floor(0.2 * weights.numel + 1e-9)
    assert all(bool((first[name] | ~second[name]).all()) for name in weights.names)


# -------------------------------------------------------------------------------------------------------- Rare Gems
def test_rare_gems_learns_scores_and_freezes_weights(digits: Data) -> None:
    network = small()
    frozen: dict[str, Tensor] = {}
    checked = 0

    def tell(event: Mapping[str, Any]) -> None:
        nonlocal checked
        if event["event"] == "phase" and event["index"] == 0:
            frozen.update({k: v.clone() for k, v in network.named_parameters()})
            for name, fan_in in (("0.weight", 9), ("6.weight", 64), ("8.weight", 12)):
                assert torch.allclose(frozen[name].abs(), torch.tensor(math.sqrt(2 / fan_in)))
        elif event["name"].startswith("mining") and event["event"] == "step":
            checked += 1
            for name, value in network.named_parameters():
                kept = value != 0
                assert torch.equal(value[kept], frozen[name][kept]), f"{name} moved while scores were learned"

    chosen = settings("rare-gems", sparsity=0.8, epochs=4, sets=("rare_gems.every=2",))
    _, found = perform(chosen, digits, network, tell=tell)
    assert checked == 4 * training_data.steps(len(digits.train), 50)
    densities = [record["kept"] / found.prunable.numel for record in found.history]
    assert densities == pytest.approx([0.2**0.5, 0.2, 0.2], abs=2e-3)
    assert any(bool((v != frozen[k]).any() & (v != 0).any()) for k, v in network.named_parameters())


def test_the_rounding_passes_the_gradient_through() -> None:
    """d loss / d score = d loss / d (used weight) · weight, whatever side of one half the score lies on."""
    linear = nn.Linear(3, 2, bias=False)
    weight, x = linear.weight.detach().clone(), torch.randn(5, 3)
    score = torch.tensor([[0.9, 0.2, 0.6], [0.4, 0.51, 0.1]])
    keep = torch.tensor([[True, True, False], [True, True, True]])
    scored = masks.Scored(linear, {"weight": score}, {"weight": keep})
    (scored(x) ** 2).sum().backward()
    used = (weight * (score > 0.5) * keep).requires_grad_(True)
    ((x @ used.T) ** 2).sum().backward()
    (learned,) = scored.named_scores().values()
    assert used.grad is not None and learned.grad is not None
    torch.testing.assert_close(learned.grad, used.grad * weight * keep)
    assert linear.weight.grad is None and not linear.weight.requires_grad


# ------------------------------------------------------------------------------------------------------ Smart-Ratio
def test_smart_ratio_shares_are_the_formula() -> None:
    sizes = [1000, 4000, 9000, 16000, 5000]
    counts = phases.smart_ratio_counts(sizes, [False] * 4 + [True], 3500, 0.3)
    assert counts[4] == 1500 and sum(counts) == 3500
    ratio = [(5 - i) ** 2 + (5 - i) for i in range(4)]
    factor = 2000 / sum(r * s for r, s in zip(ratio, sizes, strict=False))
    for count, r, s in zip(counts, ratio, sizes, strict=False):
        assert abs(count - factor * r * s) <= 1


def test_smart_ratio_overflow_goes_to_the_others_in_proportion() -> None:
    """Against the definition min(1, c·ratio) with c found by bisection."""
    sizes, keep = [200, 3000, 500, 8000, 400], 6000
    ratio = [(5 - i) ** 2 + (5 - i) for i in range(5)]
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(s * min(1.0, middle * r) for s, r in zip(sizes, ratio, strict=True))
        low, high = (middle, high) if kept < keep else (low, middle)
    wanted = [s * min(1.0, low * r) for s, r in zip(sizes, ratio, strict=True)]
    counts = phases.smart_ratio_counts(sizes, [False] * 5, keep, 0.0)
    assert wanted[0] == sizes[0] and wanted[1] == sizes[1], "two layers overflow"
    assert sum(counts) == keep and all(abs(c - w) <= 1 for c, w in zip(counts, wanted, strict=True))


def test_smart_ratio_says_when_the_linear_layers_take_everything() -> None:
    with pytest.raises(ValueError, match=r"smart_ratio.linear 0.3 keeps 300 weights .* and 200 are to stay"):
        phases.smart_ratio_counts([5000, 1000], [False, True], 200, 0.3)
    with pytest.raises(ValueError, match=r"smart_ratio.linear 0.1 .* the other layers have only 100"):
        phases.smart_ratio_counts([100, 1000], [False, True], 500, 0.1)


def test_smart_ratio_draws_each_layer_at_random(digits: Data) -> None:
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    weights = masks.prunable(network, torch.randn(2, 1, 8, 8), None)
    blank = masks.full(weights, dict(network.named_parameters()))
    level = Pattern(sparsity=0.5, scope="model")
    one, other = (masks.at_random(weights, blank, level, 0.3, seed) for seed in (0, 1))
    again = masks.at_random(weights, blank, level, 0.3, 0)
    assert all(torch.equal(one[name], again[name]) for name in weights.names)
    assert all(int(one[name].sum()) == int(other[name].sum()) for name in weights.names)
    assert not torch.equal(one["1.weight"], other["1.weight"])
    assert int(one["3.weight"].sum()) == 768, "the classifier keeps .3"


# ------------------------------------------------------------------------------------------- resume, reproducibility
class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    seen = 0

    def tell(event: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += event["event"] == "step"
        if seen == step:
            raise Killed

    return tell


@pytest.mark.parametrize(
    ("method", "sets"),
    [("lomp", ()), ("imp", ("imp.share=0.5",)), ("rare-gems", ("rare_gems.every=2",)),
     ("smart-ratio", ())],
)  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_bits(
    digits: Data, tmp_path: Path, method: str, sets: tuple[str, ...]
) -> None:
    chosen = settings(method, sparsity=0.8, epochs=3, batch_size=90, sets=sets)
    whole, uninterrupted = perform(chosen, digits, small())
    steps = sum(r["epochs"] for r in uninterrupted.history) * training_data.steps(len(digits.train), 90)
    for share in (0.4, 0.8):  # in the middle of an epoch, twice, the second time in a run that was resumed itself
        with pytest.raises(Killed):
            perform(chosen, digits, small(), checkpoint=tmp_path, interval=0, resume=share > 0.5,
                    tell=kill_at(max(4, int(steps * 0.4))))  # fmt: skip
        assert training.latest(tmp_path) is not None
    resumed, found = perform(chosen, digits, small(), checkpoint=tmp_path, interval=0, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    drop = {"seconds"}
    for before, after in zip(uninterrupted.history, found.history, strict=True):
        assert {k: v for k, v in before.items() if k not in drop} == {k: v for k, v in after.items() if k not in drop}
    assert uninterrupted.test == found.test


def one_rank(rank: int, port: int, folder: str) -> None:
    import os

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2",
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")  # fmt: skip
    chosen = settings("rare-gems", sparsity=0.8)
    network, found = perform(chosen, training_data.load(chosen))
    torch.save((network.state_dict(), found.test), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_network_of_one(digits: Data, tmp_path: Path) -> None:
    import socket

    with socket.socket() as found_port:
        found_port.bind(("127.0.0.1", 0))
        port = int(found_port.getsockname()[1])
    torch.multiprocessing.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and all(torch.equal(one[name], other[name]) for name in one)
    alone, found = perform(settings("rare-gems", sparsity=0.8), digits)
    for name, value in alone.state_dict().items():
        assert torch.equal(value != 0, one[name] != 0), f"{name}: the masks differ"
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4)


def test_a_seed_decides_everything(digits: Data) -> None:
    runs = [perform(settings("rare-gems", sparsity=0.8, seed=seed), digits)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["1.weight"], runs[2]["1.weight"])


def test_a_diverged_training_is_stopped(digits: Data) -> None:
    with pytest.raises(ValueError, match=r"dense, epoch \d: the loss is .*Lower --lr"):
        perform(settings("dense", lr=1e30, epochs=3), digits)


# --------------------------------------------------------------------------------------------------- data, networks
def test_batches_are_an_order_of_all_images_and_shared_out_between_ranks(digits: Data) -> None:
    def labels(epoch: int, rank: int = 0, world: int = 1) -> list[Tensor]:
        return [y for _, y in training_data.batches(digits, 50, "none", 0, epoch, rank, world)]

    whole = labels(0)
    assert len(whole) == training_data.steps(len(digits.train), 50) == 5
    for step, both in enumerate(zip(labels(0, 0, 2), labels(0, 1, 2), strict=True)):
        assert sorted(torch.cat(both).tolist()) == sorted(whole[step].tolist())
    assert not torch.equal(torch.cat(whole), torch.cat(labels(1)))
    with_every_image = training_data.batches(digits, len(digits.train), "none", 0, 0)
    pixels, _ = next(iter(with_every_image))
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-3) and float(pixels.std()) == pytest.approx(1, abs=1e-2)


def test_crops_are_shifts_with_black_moving_in() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(1, 255, (6, 2, 16, 16), dtype=torch.uint8)
    corner = torch.tensor([[0, 0], [2, 2], [4, 4], [0, 4], [1, 3], [3, 0]])
    found = training_data._crop(pixels, corner, 2)
    for image, (row, column), moved in zip(pixels, corner.tolist(), found, strict=True):
        wide = torch.zeros(2, 20, 20, dtype=torch.uint8)
        wide[:, 2:18, 2:18] = image
        assert torch.equal(moved, wide[:, row : row + 16, column : column + 16])


def test_parts_do_not_overlap(digits: Data) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (270, 30, 450)
    assert digits.image == (1, 8, 8), "grey images have one channel"
    train_, held = digits.train.pixels.flatten(1), digits.validation.pixels.flatten(1)
    assert not bool((train_[:, None] == held[None]).all(-1).any())


def folder_of_images(tmp_path: Path, sizes: list[int], labelled: bool = True) -> Path:
    from PIL import Image

    for split in ("train", "test"):
        for i, size in enumerate(sizes):
            place = tmp_path / split / (("cat", "dog")[i % 2] if labelled else "")
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (40 * (i % 2) + 5 * i, 9, 77)).save(place / f"{i}.png")
    return tmp_path


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    data = str(folder_of_images(tmp_path, [8, 9, 8, 9, 8, 9]))
    flags = {"method": "dense", "network": "mlpnet", "dataset": data}
    with pytest.raises(ValueError, match=r"several sizes .* choose one with --image-size"):
        training_data.load(training_recipe.resolve(None, flags=flags))
    found = training_data.load(training_recipe.resolve(None, flags={**flags, "image_size": 12}))
    assert found.image == (3, 12, 12) and found.names == ["cat", "dog"]
    assert found.where["eval_split"] == "test"


@pytest.mark.parametrize("name", sorted(set(networks.NETWORKS) - {"fc5", "fc12", "resnet50", "vgg16"}))
def test_networks_learn_from_any_small_image(name: str) -> None:
    network = networks.build(name, (3, 16, 16), 7)
    logits = network(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    again = networks.build(name, (3, 16, 16), 7)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "layers", "weights"),
    [("fc5", 5, 3072 * 1000 + 1000 * 600 + 600 * 300 + 300 * 100 + 1000), ("fc12", 12, None), ("alexnet", 8, None),
     ("vgg16", 14, 14_715_584), ("resnet18", 21, 11_164_352), ("resnet50", 54, 23_467_712), ("resnet20", 22, None)],
)  # fmt: skip
def test_the_papers_networks_have_their_layers(name: str, layers: int, weights: int | None) -> None:
    with torch.device("meta"):
        network = networks.NETWORKS[name]((3, 32, 32), 10)
    prunable = [p for n, p in network.named_parameters() if p.dim() >= 2]
    assert len(prunable) == layers
    if weights is not None:
        assert sum(p.numel() for p in prunable) == weights


def test_small_images_for_a_deep_network_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 8x8 pixels are too small for it"):
        networks.build("vgg16", (1, 8, 8), 10)


# ----------------------------------------------------------------------------------------------------------- recipes
def test_every_recipe_resolves_for_every_method(repo_root: Path) -> None:
    names = assets.names("recipes/train")
    assert {p.stem for p in (repo_root / "recipes" / "train").glob("*.yaml")} == set(names)
    wanted = {"fc5", "fc12", "alexnet", "vgg16", "resnet18", "resnet50"}
    assert wanted <= {name.partition("-")[0] for name in names}
    for name in names:
        for method in phases.METHODS:
            flags = {"method": method} | ({"sparsity": 0.98} if method != "dense" else {})
            chosen = training_recipe.resolve(name, flags=flags)
            assert chosen.network == name.partition("-")[0]
            assert chosen.description and phases.longest(method, chosen.settings(), chosen.pattern(), chosen.epochs)


def test_a_dumped_run_is_the_run(tmp_path: Path) -> None:
    chosen = settings("imp", sparsity=0.9, sets=("imp.through=[.5, .8]", "skip=[1.weight]"))
    file = tmp_path / "mine.yaml"
    file.write_text(training_recipe.to_yaml(chosen))
    assert training_recipe.resolve(file) == chosen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method lmop --sparsity .9", "choose one of lomp, imp"),
        ("--method lomp --network resnet81 --sparsity .9", "there is no network 'resnet81'.*Did you mean resnet"),
        ("--method lomp", "what to keep is not said: give --sparsity S"),
        ("--method dense --sparsity .9", "dense prunes nothing"),
        ("--method smart-ratio --nm 2:4", "smart-ratio gives every layer a share of its own"),
        ("--method imp --nm 2:4 --sparsity .5", "--nm and --sparsity contradict each other"),
        ("--method imp --sparsity .9 --l1 .1", "--l1 has no effect with --method imp: it is an option of lomp"),
        ("--method imp --sparsity .9 --set imp.rewnd=1", "imp has no option 'rewnd'.*Did you mean rewind"),
        ("--method imp --sparsity .9 --set imp.rewind=20", "must be less than the 20 epochs of a round"),
        ("--method imp --sparsity 1.5", "the share of zeros must lie between 0 and 1"),
        ("--method lomp --sparsity .9 --l1 many", "lomp.l1: expected a number .* or auto, found many"),
        ("--method lomp --sparsity .9 --epochs 0", "--epochs: expected a whole number of at least 1"),
        ("--method lomp --sparsity .9 --recipe resnet18-cifar1000", "^hf-prune: --recipe.*Did you mean resnet"),
        ("--method lomp --sparsity .9 --precision half", "choose one of no, bf16, fp16"),
        ("--method lomp --sparsity .9 --epoch 3", "unrecognized arguments: --epoch 3.*Did you mean --epochs"),
        ("--method lomp --sparsity .9 --resume", "--resume: no stopped run"),
        ("--method lomp --sparsity .9 --set epochz=3", "there is no such key. Did you mean epochs"),
        ("--method lomp --sparsity .9 --batch-size 5000", "at most the 1212 training images"),
    ],
)
def test_mistakes_are_answered(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    known = "" if "--network" in words else "--network mlpnet "
    assert cli.main(f"train --dataset digits {known}{words}".split()) == 2
    import re

    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_unknown_keys_of_a_recipe_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("network: mlpnet\ndataset: digits\nepoch: 3\nrare_gems: {evry: 2}\noutput_dir: /tmp\n")
    with pytest.raises(ValueError) as error:
        training_recipe.resolve(file, flags={"method": "lomp", "sparsity": 0.9})
    for part in ("3 problems", "epoch (epoch (recipe mine)): there is no such key", "no option 'evry'", "output_dir"):
        assert part in str(error.value)


# ----------------------------------------------------------------------------------------------------------- command
def test_the_command_trains_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "train --network lenet300 --dataset digits --method lomp --l1 1e-3 --sparsity 0.8 --epochs 12 --lr .1"
    assert cli.main(words.split()) == 0
    out = capsys.readouterr()
    folder = tmp_path / "lenet300-digits-lomp-80pct"
    written = sorted(p.name for p in folder.iterdir())
    assert written == ["README.md", "model.safetensors", "recipe.yaml", "training.json"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name], "the state of a finished run is gone"
    assert "test accuracy" in out.out and "one magnitude threshold" in out.out and "L1 0.001" in out.err
    assert [line for line in (out.out + out.err).splitlines() if len(line) > 80] == []

    told = train.read(folder)
    network = networks.load(folder)
    data = training_data.load(training_recipe.resolve(folder / "recipe.yaml"))
    with torch.no_grad():
        right = network(data.scaled(data.test.pixels)).argmax(1) == data.test.labels
    assert told["test"]["accuracy"] == pytest.approx(float(right.float().mean()))
    assert told["test"]["accuracy"] > 0.9, "chance is .1"
    stored = load_file(folder / "model.safetensors")
    zeros = sum(int((stored[layer["name"]] == 0).sum()) for layer in told["layers"])
    assert zeros == 50200 - 10040
    assert f"{100 * told['test']['accuracy']:.2f} %" in (folder / "README.md").read_text()
    assert told["l1"] == 1e-3 and [p["name"] for p in told["phases"]] == ["L1 0.001", "threshold"]

    assert cli.main(words.split()) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["inspect", str(folder)]) == 0


def test_the_command_takes_up_a_stopped_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "train --network mlpnet --dataset digits --method imp --sparsity 0.6 --epochs 2 --set imp.share=.5".split()
    assert cli.main([*words, "--output-dir", "whole", "--quiet"]) == 0
    original = training.train

    def stopped(*args: Any, **more: Any) -> Any:
        more |= {"interval": 0, "tell": kill_at(20)}
        try:
            return original(*args, **more)
        except Killed:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(training, "train", stopped)
    capsys.readouterr()
    assert cli.main([*words, "--output-dir", "cut"]) == 130
    assert "The same command with --resume goes on." in capsys.readouterr().err
    monkeypatch.setattr(training, "train", original)
    assert cli.main([*words, "--output-dir", "cut"]) == 2
    assert "go on with --resume, or drop its work with --overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--output-dir", "cut", "--resume", "--lr", "0.3"]) == 2
    assert "another lr (lr 0.1, now 0.3)" in capsys.readouterr().err
    assert cli.main([*words, "--output-dir", "cut", "--resume"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    before, after = (json.loads((tmp_path / name / "training.json").read_text())["test"] for name in ("whole", "cut"))
    assert before == after


def test_bfloat16_trains_and_writes_float32(digits: Data) -> None:
    from accelerate.state import AcceleratorState

    plain, reference = perform(settings("rare-gems", sparsity=0.5), digits)
    AcceleratorState._reset_state(True)  # one process, one precision: accelerate's state is shared
    try:
        network = networks.build("mlpnet", digits.image, 10)
        found = training.train(network, digits, settings("rare-gems", sparsity=0.5, precision="bf16"),
                               Accelerator(cpu=True, mixed_precision="bf16"))  # fmt: skip
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert found.test["loss"] != reference.test["loss"]
        assert found.test["loss"] == pytest.approx(reference.test["loss"], rel=0.05)
        logits = network(digits.scaled(digits.test.pixels))
        assert logits.dtype == torch.float32
        loss = nn.functional.cross_entropy(logits, digits.test.labels).item()
        assert found.test["loss"] == pytest.approx(loss, rel=1e-5), "measured in float32, whatever it was trained in"
    finally:
        AcceleratorState._reset_state(True)
