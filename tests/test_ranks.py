"""Several processes: the same model as one, whatever their number, and no hang when one is lost."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from nets import Block
from torch import nn

from hf_prune import ranks
from hf_prune.loop import Recipe, prune

if os.name != "posix":
    pytest.skip("processes are forked", allow_module_level=True)

fork = multiprocessing.get_context("fork")
DEFAULT = Recipe(nm="2:4")
# the output metric couples rows: masks are divided, solves are not
METRIC = Recipe(nm="2:4", target={"metric": 0.5, "caution": 0.5})
SPARSEGPT = Recipe(nm="2:4", mask={"method": "sparsegpt"}, solve=None)
EXCHANGE = Recipe(nm="2:4", mask={"method": "exchange"}, target={"metric": 0.5, "caution": 0.5})
HALF = Recipe(sparsity=0.5)  # one threshold for a layer: its rows are not divided


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), Block(), Block(), nn.Linear(8, 5))


def images(n, size=1):
    return [torch.randn(size, 6, 12, generator=torch.Generator().manual_seed(k)) for k in range(n)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(rank, size, port, work, answer, seconds):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    try:
        answer.put((rank, work(rank, size)))
    except Exception as error:  # noqa: BLE001 - carried to the test
        answer.put((rank, error))
    torch.distributed.destroy_process_group()


def run(size, work, seconds=60):
    """What `work(rank, size)` returns or raises on each rank; ranks that were killed are missing."""
    answer = fork.Queue()
    port = free_port()
    processes = [fork.Process(target=start, args=(r, size, port, work, answer, seconds)) for r in range(size)]
    for p in processes:
        p.start()
    found = {}
    for p in processes:
        p.join(seconds + 60)
        assert p.exitcode is not None, "a process hangs"
    while len(found) < sum(p.exitcode == 0 for p in processes):
        rank, value = answer.get(timeout=10)
        found[rank] = value
    return found


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What torch imports on first use is then there in every forked child."""
    prune(network(), images(2), DEFAULT)


class Classifier(nn.Module):
    """Answers with logits, (images, classes)."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x).mean(1)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_an_allocation_is_tried_where_a_rank_has_no_images(labelled):
    """Of two ranks and one image, the second has nothing from which it could tell what the loss is."""

    def given():
        batch = images(1, size=3)[0]
        return [(batch, torch.tensor([0, 3, 1]))] if labelled else [batch]

    def work(rank, size):
        model = Classifier()
        recipe = Recipe(sparsity=0.5, scope="model", allocation="lamp")
        report = prune(model, given() if rank == 0 else [], recipe)
        return {k: v.numpy() for k, v in model.state_dict().items()}, report.notes

    found = run(2, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    alone = work(0, 1)
    assert any("lamp" in note for note in alone[1])
    for r in range(2):
        assert found[r][1] == alone[1]
        for name, w in alone[0].items():
            assert (found[r][0][name] == w).all(), name


def test_every_rank_draws_numbers_of_its_own(monkeypatch):
    drawn = {}
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        for stage in range(200):
            drawn[rank, stage] = ranks.own(7 + stage)
    assert len(set(drawn.values())) == len(drawn) and drawn[0, 5] == 12
    made = [torch.Generator().manual_seed(s) for s in drawn.values()]
    numbers = {torch.rand(1, generator=g, dtype=torch.float64).item() for g in made}
    assert len(numbers) == len(drawn), "torch draws the same from two of the seeds"


@pytest.mark.parametrize("size, count", [(2, 5), (3, 5), (4, 3)], ids=["uneven", "three", "fewer images than ranks"])
@pytest.mark.parametrize(
    "recipe",
    [DEFAULT, METRIC, SPARSEGPT, EXCHANGE, HALF],
    ids=["default", "metric", "sparsegpt", "exchange", "unstructured"],
)
def test_any_number_of_ranks_gives_the_same_model(recipe, size, count):
    def work(rank, size):
        model = network()
        report = prune(model, images(count)[rank::size], recipe)
        return {k: v.numpy() for k, v in model.state_dict().items()}, report.layers

    found = run(size, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    alone = network()
    prune(alone, images(count), recipe)
    for name, w in alone.state_dict().items():
        for r in range(size):
            other = torch.from_numpy(found[r][0][name])
            assert torch.equal(torch.from_numpy(found[0][0][name]), other), "all ranks hold the same bits"
            assert torch.equal(w != 0, other != 0), f"{name}: the masks differ"
            assert torch.equal(w, other), f"{name}: the order of the sums shows"
    layers = [r for r in found[0][1] if r["pattern"]]
    assert all(r["sent_bytes"] > 0 for r in layers)
    sums = 8 * (12 * 12 + 12 + 12 * 8 + 2 * 8) + 16  # xx, sx, xd, dd, sd of the first layer; two counts
    assert layers[0]["sent_bytes"] == sums, "so little work is done by every rank"


def test_a_classifier_behind_an_average_is_the_same_on_any_number_of_ranks():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    recipe = Recipe(nm="2:4", prune_head=True)

    def given():
        return [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(k)) for k in range(5)]

    def work(rank, size):
        model = Averaged()
        prune(model, given()[rank::size], recipe)
        return {k: v.numpy() for k, v in model.state_dict().items()}

    found, alone = run(2, work), work(0, 1)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    for r in range(2):
        for name, w in alone.items():
            assert (found[r][name] == w).all(), name


@pytest.mark.parametrize("recipe", [DEFAULT, SPARSEGPT, HALF], ids=["default", "sparsegpt", "unstructured"])
def test_rows_are_divided_where_that_is_worth_it(recipe):
    def work(rank, size):
        from hf_prune import loop

        seen = []
        real = loop.call
        loop.call = lambda kind, role, *p: (seen.append(tuple(p[0].weight.shape)), real(kind, role, *p))[1]
        ranks.WORTH = 0
        model = network()
        sent = prune(model, images(3)[rank::size], recipe).layers[0]["sent_bytes"]
        return {k: v.numpy() for k, v in model.state_dict().items()}, seen, sent

    found = run(3, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    each = 0 if recipe is HALF else (4 + 1) + 4 * (recipe is DEFAULT)  # a weight and its mask; a refit weight
    shapes = [(1, 3, 12), (1, 3, 12), (1, 2, 12)] if each else [(1, 8, 12)] * 3
    assert [found[r][1][0] for r in range(3)] == shapes
    assert found[0][2] == 8 * (12 * 12 + 12 + 12 * 8 + 2 * 8) + 16 + 3 * 12 * each
    alone = network()
    prune(alone, images(3), recipe)
    for name, w in alone.state_dict().items():
        assert all((found[0][0][name] == found[r][0][name]).all() for r in range(3)), "all ranks hold the same bits"
        other = torch.from_numpy(found[0][0][name])
        assert torch.equal(w != 0, other != 0) and torch.allclose(w, other, rtol=1e-3, atol=1e-5), name


KSTEP = {"method": "snows", "k": 1, "cg": 3, "images": 2, "passes": 2}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(nm="2:4", mask={"method": "magnitude"}, solve=KSTEP),
        Recipe(nm="2:4", refine={"method": "snows", "cg": 2, "images": 2}),
    ],
    ids=["K-step", "refine"],
)
@pytest.mark.parametrize("size, count", [(2, 5), (3, 4), (3, 2)], ids=["uneven", "three", "fewer images than ranks"])
def test_windows_have_the_minibatches_of_one_process(recipe, size, count):
    def work(rank, size):
        model = network()
        prune(model, images(count)[rank::size], recipe)
        return {k: v.numpy() for k, v in model.state_dict().items()}

    found = run(size, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    alone = network()
    prune(alone, images(count), recipe)
    for name, w in alone.state_dict().items():
        assert all(torch.equal(w, torch.from_numpy(found[r][name])) for r in range(size)), name


def test_a_rank_that_dies_ends_the_others_with_a_message():
    def work(rank, size):
        def tell(event):
            if event["event"] == "layer" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        return prune(network(), images(6)[rank::size], DEFAULT, progress=tell)

    began = time.monotonic()
    found = run(3, work)
    assert set(found) == {0, 2} and time.monotonic() - began < 30
    assert all(isinstance(e, ranks.Lost) and "a process has ended" in str(e) for e in found.values()), found


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_time_limit():
    def work(rank, size):
        def tell(event):
            if event["event"] == "layer" and rank == 1:
                time.sleep(12)

        return prune(network(), images(6)[rank::size], DEFAULT, progress=tell)

    began = time.monotonic()
    found = run(2, work, seconds=4)
    assert isinstance(found[0], ranks.Lost) and "has not answered in time" in str(found[0])
    assert time.monotonic() - began < 40


def test_a_destroyed_group_is_gone():
    """Else its threads run on, and the process may abort at exit.  In a fresh process, which has imported nothing."""
    code = """if True:
        import weakref, torch
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        import hf_prune
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        hf_prune.prune(model, [torch.randn(4, 4, 8, 8)], "magnitude", sparsity=0.5)
        group = weakref.ref(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()
        assert group() is None
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mistake_of_rank_0_reaches_all(tmp_path):
    (tmp_path / "file").write_text("")

    def work(rank, size):
        return prune(network(), images(4)[rank::size], DEFAULT, checkpoint=tmp_path / "file" / "blocks")

    found = run(2, work)
    assert isinstance(found[0], OSError) and isinstance(found[1], ranks.Told)
    assert "cannot be created" in str(found[0]) and str(found[1]) == str(found[0])


def test_a_stopped_run_of_two_ranks_resumes_on_both(tmp_path):
    def stopped(rank, size):
        def tell(event):
            if event["event"] == "layer" and event["block"] == "2":
                raise KeyError("stop")

        return prune(network(), images(4)[rank::size], DEFAULT, progress=tell, checkpoint=tmp_path / "blocks")

    def whole(rank, size):
        model = network()
        prune(model, images(4)[rank::size], DEFAULT, checkpoint=tmp_path / ("blocks" if size else ""))
        return {k: v.numpy() for k, v in model.state_dict().items()}

    def fresh(rank, size):
        model = network()
        prune(model, images(4)[rank::size], DEFAULT)
        return {k: v.numpy() for k, v in model.state_dict().items()}

    run(2, stopped)
    assert len(list((tmp_path / "blocks").glob("*.safetensors"))) == 2
    again, once = run(2, whole), run(2, fresh)
    assert all((again[r][k] == once[r][k]).all() for r in range(2) for k in once[r])
    found = run(3, whole)
    assert all("processes was 2, is 3" in str(e) for e in found.values()), found


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"announces 2 processes \(WORLD_SIZE\), but the process group has 1"):
        prune(network(), images(2), DEFAULT)


def test_shares():
    assert ranks.shares(5) == [5]


def test_the_products_of_a_coupled_solve_are_divided():
    """Their columns, wherever that is worth its bytes; masks stay, weights move by rounding at most."""

    def work(rank, size):
        ranks.WORTH = 0
        parts = []
        real = ranks.columns
        from hf_prune import loop

        loop.ranks.columns = lambda some, cost, n: real(lambda c: (parts.append(c), some(c))[1], cost, n)
        model = network()
        report = prune(model, images(5)[rank::size], METRIC)
        return {k: v.numpy() for k, v in model.state_dict().items()}, parts, report.layers

    found = run(3, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    assert [found[r][1][0] for r in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    alone = network()
    prune(alone, images(5), METRIC)
    for name, w in alone.state_dict().items():
        assert all((found[0][0][name] == found[r][0][name]).all() for r in range(3))
        other = torch.from_numpy(found[0][0][name])
        assert torch.equal(w != 0, other != 0) and torch.allclose(w, other, rtol=5e-3, atol=1e-4), name
    few = run(3, lambda r, s: prune(network(), images(5)[r::s], METRIC).layers[0]["sent_bytes"])
    assert found[0][2][0]["sent_bytes"] > few[0]


def test_a_network_that_is_taught_on_two_ranks_ends_as_one_model():
    recipe = Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None, distill={"epochs": 8, "lr": 0.01, "images": 4})

    def work(rank, size):
        model = network()
        report = prune(model, images(9, 4)[rank::size], recipe)
        return {k: v.numpy() for k, v in model.state_dict().items()}, report.distillation

    found = run(2, work)
    assert not [v for v in found.values() if isinstance(v, Exception)], found
    (one, told), (other, same) = found[0], found[1]
    assert told == same and told["kept"] > 0 and told["held_out"] == 8
    for name in one:
        assert (one[name] == other[name]).all(), name


def test_every_rank_needs_a_batch_to_keep_out():
    recipe = Recipe(nm="2:4", distill={"epochs": 1})

    def work(rank, size):
        prune(network(), images(3)[rank::size], recipe)

    found = run(2, work)
    assert all(isinstance(e, ValueError) and "keeps whole batches out" in str(e) for e in found.values()), found
