"""CMIM in a loop of one's own: the trap of the bare loss, powers and memory after an interruption, several processes, workers, mixed precision."""
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from cmim_repro import CMIMLoss, Indexed, objective
from cmim_repro.core import Invalid

LABELS = torch.arange(24) % 3
SCORES = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def test_the_trap_of_the_readmes_old_snippet_is_refused_and_the_new_loss_has_none():
    bare = objective('cmim', weight=.5, num_classes=3, train_labels=LABELS)
    with pytest.raises(Invalid, match='has no outputs for these powers'): bare(SCORES[:6], None, LABELS[:6]) # outputs never shown
    uniform = objective('cmim', weight=.5, num_classes=3, centroids='batch')
    uniform.observe(torch.zeros(6, 3).log_softmax(1), LABELS[:6], None) # what it would train towards
    loss = CMIMLoss(LABELS, 3)(SCORES[:6], LABELS[:6], torch.arange(6))
    assert loss < uniform(SCORES[:6], None, LABELS[:6])


def test_epochs_are_counted_also_when_a_last_batch_is_dropped():
    loss, starts = CMIMLoss(LABELS, 3), []
    for step in range(40):
        rows = torch.arange(5*(step % 4), 5*(step % 4) + 5) # 20 of 24 images an epoch
        loss(SCORES[rows], LABELS[rows], rows)
        starts.append(loss.now)
    assert starts == sorted(starts) and starts[-1] == 7 and starts.index(1) == 5 # 40 steps of 5 images are 8 times 24 and a rest


def test_an_interrupted_training_goes_on_with_the_same_bits():
    def steps(loss, network, optimizer, count, start):
        for step in range(start, start + count):
            rows = torch.arange(8*(step % 3), 8*(step % 3) + 8)
            optimizer.zero_grad()
            loss(network(SCORES[rows]), LABELS[rows], rows).backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(1)
        network = torch.nn.Linear(3, 3)
        return CMIMLoss(LABELS, 3, weight=2.), network, torch.optim.SGD(network.parameters(), .1)

    whole = fresh()
    steps(*whole, 11, 0)
    first, second = fresh(), fresh()
    steps(*first, 5, 0)
    for old, new in zip(first, second, strict=True): new.load_state_dict(old.state_dict())
    steps(*second, 6, 5)
    assert torch.equal(whole[1].weight, second[1].weight) and (whole[0].now, whole[0].seen) == (second[0].now, second[0].seen) == (3, 16)


def test_indices_come_through_workers():
    loader = DataLoader(Indexed(TensorDataset(SCORES, LABELS)), 6, shuffle=True, num_workers=2)
    for scores, labels, indices in loader: assert torch.equal(SCORES[indices], scores) and torch.equal(LABELS[indices], labels)


def test_mixed_precision_is_taken():
    rows, loss = torch.arange(6), CMIMLoss(LABELS, 3)
    with torch.autocast('cpu', torch.bfloat16): value = loss(SCORES[:6].bfloat16().requires_grad_(), LABELS[:6], rows)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite()


def test_batch_centroids_need_no_memory():
    loss = CMIMLoss(LABELS, 3, centroids='batch', weight=0)
    assert not hasattr(loss.cmim.bank, 'log_probs')
    assert torch.isclose(loss(SCORES, LABELS, torch.arange(24)), F.cross_entropy(SCORES, LABELS))


TOGETHER = textwrap.dedent('''
    import sys, torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from cmim_repro import CMIMLoss
    from cmim_repro.lab.processes import end_together
    torch.set_num_threads(1)
    if len(sys.argv) > 1: dist.init_process_group('gloo')
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    labels = torch.arange(24) % 3
    scores = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    linear = torch.nn.Linear(3, 3)
    network = DistributedDataParallel(linear) if world > 1 else linear
    optimizer, cmim = torch.optim.SGD(network.parameters(), .1), CMIMLoss(labels, 3, weight=2.)
    for step in range(9):
        rows = torch.arange(8*(step % 3), 8*(step % 3) + 8)[rank*8//world:(rank + 1)*8//world]
        optimizer.zero_grad()
        cmim(network(scores[rows]), labels[rows], rows).backward()
        optimizer.step()
    found = {'weight': linear.weight.data, 'now': cmim.now}
    if world > 1 and rank == 0: torch.save(found, sys.argv[1])
    end_together()
''')


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    script, place = tmp_path/'loop.py', tmp_path/'two.pt'
    script.write_text(TOGETHER)
    monkeypatch.setattr(sys, 'argv', ['loop.py'])
    one = {}
    exec(TOGETHER, one)
    started = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script), str(place)]
    done = subprocess.run(started, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(place, weights_only=True)
    torch.testing.assert_close(one['found']['weight'], two['weight'], rtol=1e-5, atol=1e-6)
    assert one['found']['now'] == two['now'] == 2
