"""The three centroid banks: exact after any sequence of batches, restored from a state, and the same in two processes as in one."""
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.core import Invalid, keyed_generator
from cmim_repro.defenses.centroids import BatchBank, MemoryBank, ResampleBank, memory_bank_bytes
from cmim_repro.defenses.core import objective
from cmim_repro.lab.processes import end_together, gather_over_processes
from cmim_repro.theory.objective import draw_powers

SAMPLES, CLASSES, N = 14, 3, 4
LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 0, 1, 2, 2, 0, 1, 0, 1])


def centroids(log_probs, labels, powers, classes=CLASSES):
    "Class means of power-transformed outputs (C, N, C), uniform for a class without samples."
    p = (powers.double()[:, None]*log_probs.double()[:, None]).softmax(-1)
    return torch.stack([p[labels == y].mean(0) if (labels == y).any() else p.new_full(p.shape[1:], 1/classes) for y in range(classes)])


events = st.lists(st.one_of(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=9), st.just('powers'), st.just('reload')), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(events=events, scale=st.floats(.1, 30), seed=st.integers(0, 10**6))
def test_memory_bank_is_exact_after_any_sequence(events, scale, seed):
    generator, powers = torch.Generator().manual_seed(seed), draw_powers(N, key=(seed, 'powers', 0))
    bank, latest = MemoryBank(LABELS, CLASSES, N), torch.full((SAMPLES, CLASSES), math.nan)
    bank.start_epoch(powers)
    for number, event in enumerate(events):
        if event == 'powers':
            powers = draw_powers(N, key=(seed, 'powers', number))
            bank.start_epoch(powers)
        elif event == 'reload':
            state, bank = bank.state_dict(), MemoryBank(LABELS, CLASSES, N)
            bank.load_state_dict(state)
        else:
            outputs = (scale*torch.randn(len(event), CLASSES, generator=generator)).log_softmax(-1)
            for i, row in zip(event, outputs, strict=True): latest[i] = row
            bank.observe(outputs, LABELS[event], torch.tensor(event))
    seen = ~latest[:, 0].isnan()
    if not seen.any():
        with pytest.raises(Invalid, match='The bank of centroids has no outputs'): bank.log_centroids.any()
        return
    expected = centroids(latest[seen], LABELS[seen], powers)
    torch.testing.assert_close(bank.log_centroids.exp(), expected, rtol=1e-4, atol=1e-6)
    assert bank.counts.tolist() == torch.bincount(LABELS[seen], minlength=CLASSES).tolist()
    assert bank.sums.min() >= 0 and bank.log_centroids.isfinite().all()


def test_memory_bank_does_not_drift():
    "Two thousand updates without a rebuild leave the sums of a freshly built bank, to rounding in float64."
    bank, fresh = MemoryBank(LABELS, CLASSES, N), MemoryBank(LABELS, CLASSES, N)
    powers = draw_powers(N, key=(0,))
    for b in (bank, fresh): b.start_epoch(powers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        bank.observe((8*torch.randn(5, CLASSES, generator=generator)).log_softmax(-1), None, torch.randperm(SAMPLES, generator=generator)[:5])
    seen = bank.seen.nonzero()[:, 0]
    fresh.observe(bank.log_probs[seen], None, seen)
    torch.testing.assert_close(bank.sums, fresh.sums, rtol=0, atol=1e-12)


def test_unseen_samples_and_classes_do_not_count():
    bank = MemoryBank(LABELS, CLASSES, N)
    bank.start_epoch(draw_powers(N))
    outputs = torch.randn(2, CLASSES).log_softmax(-1)
    bank.observe(outputs, LABELS[:2], torch.arange(2))
    torch.testing.assert_close(bank.log_centroids.exp(), centroids(outputs, LABELS[:2], bank.powers), rtol=1e-5, atol=1e-7)
    assert bank.counts.tolist() == [1, 1, 0]


def shown(bank, batch=2):
    "The bank after a batch of outputs, in its own way."
    outputs, indices = torch.randn(batch, CLASSES).log_softmax(-1), torch.arange(batch)
    if isinstance(bank, ResampleBank): bank.replace([(outputs, LABELS[:batch])])
    else: bank.observe(outputs, LABELS[:batch], indices)
    return bank


BANKS = {'batch': lambda: BatchBank(CLASSES, N), 'memory': lambda: MemoryBank(LABELS, CLASSES, N),
         'resample': lambda: ResampleBank(LABELS, CLASSES, N, per_class=3)}


def refuses(bank):
    "Do rows and centroids name, in one sentence, what to call?"
    for ask in (lambda: bank.rows(LABELS[:2], slice(0, N)), lambda: bank.log_centroids):
        with pytest.raises(Invalid, match='The bank of centroids has no outputs for these powers: call start_epoch') as refusal: ask()
        hook = 'before_step(forward, data, batch)' if isinstance(bank, ResampleBank) else 'observe(log_probs, labels, indices)'
        assert hook in str(refusal.value) and '\n' not in str(refusal.value)
    return True


@pytest.mark.parametrize('kind', BANKS)
def test_a_bank_without_outputs_or_powers_refuses(kind):
    bank, powers = BANKS[kind](), draw_powers(N)
    assert refuses(bank) and refuses(shown(bank)) # without powers, outputs are of no use
    bank = BANKS[kind]()
    bank.start_epoch(powers)
    assert refuses(bank) and shown(bank).log_centroids.isfinite().all()
    bank.start_epoch(powers/2)
    if kind == 'memory': assert bank.log_centroids.isfinite().all() # its stored outputs are powered anew
    else: assert refuses(bank)
    bank.clear()
    assert refuses(bank)
    if kind != 'memory': assert refuses(shown(bank, batch=0))


@pytest.mark.parametrize('kind', BANKS)
def test_a_loaded_bank_knows_whether_it_was_shown_outputs(kind):
    bank = BANKS[kind]()
    bank.start_epoch(draw_powers(N))
    empty, full = (BANKS[kind]() for _ in range(2))
    full.start_epoch(draw_powers(N))
    empty.load_state_dict(bank.state_dict())
    shown(full).load_state_dict(bank.state_dict())
    assert refuses(empty) and refuses(full)
    empty.load_state_dict(shown(bank).state_dict())
    assert empty.log_centroids.equal(bank.log_centroids) and deepcopy(bank).log_centroids.equal(bank.log_centroids)


@pytest.mark.parametrize('kind', BANKS)
def test_cmim_without_outputs_computes_nothing(kind):
    "A loop without the hooks would train towards uniform outputs, and look like a success."
    method = objective('cmim', centroids=kind, per_class=2, num_classes=CLASSES, train_labels=LABELS, seed=0)
    with pytest.raises(Invalid, match='call start_epoch'): method(torch.randn(2, CLASSES), None, LABELS[:2])
    assert shown(method.bank) and method(torch.randn(2, CLASSES), None, LABELS[:2]).isfinite()
    method.start_epoch(1)
    if kind != 'memory':
        with pytest.raises(Invalid, match='call start_epoch'): method(torch.randn(2, CLASSES), None, LABELS[:2])


@pytest.mark.parametrize('batch', [1, 2, 40])
def test_rows_agree_with_the_whole_table(batch):
    "Both ways of reading (few rows, many rows) give the same log-centroids."
    bank, labels = BatchBank(CLASSES, N), torch.arange(batch) % CLASSES
    bank.start_epoch(draw_powers(N))
    bank.observe((5*torch.randn(batch, CLASSES)).log_softmax(-1), labels)
    for part in (slice(0, N), slice(1, 3)):
        torch.testing.assert_close(bank.rows(labels, part, torch.float64), bank.log_centroids[labels, part].transpose(0, 1))


def test_exact_zeros_and_underflow_leave_finite_logarithms():
    bank = BatchBank(CLASSES, 2)
    bank.start_epoch(torch.tensor([0., 2.]))
    bank.observe(torch.tensor([[0., -math.inf, -400.]]), torch.tensor([1]))
    rows = bank.rows(torch.tensor([1]), slice(0, 2))
    assert rows.isfinite().all() and rows[1, 0, 0] == 0 and rows[1, 0, 1] < -80
    torch.testing.assert_close(rows[0, 0].exp(), torch.full((3,), 1/3))


def test_memory_bank_announces_its_size_and_refuses(capsys):
    labels = torch.zeros(60_000, dtype=torch.long)
    bank = MemoryBank(labels, 10, 5)
    need = memory_bank_bytes(60_000, 10, 5)
    assert need == sum(b.nbytes for b in bank.buffers()) and f'{need/1e6:,.1f} MB' in capsys.readouterr().out
    with pytest.raises(Invalid, match='memory bank needs 3 MB on cpu, 2 MB allowed'): MemoryBank(labels, 10, 5, limit=2e6)
    # the whole of ImageNet many times over: refused before a byte is taken
    with pytest.raises(Invalid, match='MB free'): MemoryBank(torch.zeros(1, dtype=torch.long).expand(10**9), 1000, 50)


def test_more_samples_than_the_smallest_class_has_are_refused():
    "The fifth class is empty and does not count; the third has three."
    labels = torch.cat([LABELS, torch.full((9,), 3)])
    assert ResampleBank(labels, 5, N, per_class=3).draw(0)[1].bincount(minlength=5).tolist() == [3, 3, 3, 3, 0]
    for per_class in (4, 100):
        with pytest.raises(Invalid, match=rf'per_class\) is {per_class}, but class 2 has only 3 of them') as refusal:
            objective('cmim', centroids='resample', per_class=per_class, num_classes=5, train_labels=labels)
        assert '\n' not in str(refusal.value)
    objective('cmim', centroids='memory', per_class=100, num_classes=5, train_labels=labels) # draws nothing
    with pytest.raises(Invalid, match='has only 0 of them'): ResampleBank(labels[:0], 5, N, per_class=1)


def test_resample_draws():
    labels = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0))
    labels[labels == 6] = 5 # the last class is empty
    bank = ResampleBank(labels, 7, N, per_class=9)
    indices, classes = bank.draw(1, 'centroids', 2, 3)
    assert labels[indices].equal(classes) and len(indices.unique()) == len(indices)
    assert classes.bincount(minlength=7).tolist() == labels.bincount(minlength=7).clamp(max=9).tolist()
    assert indices.equal(bank.draw(1, 'centroids', 2, 3)[0]) and not indices.equal(bank.draw(1, 'centroids', 2, 4)[0])
    some, _ = bank.draw(1, 'centroids', 2, 3, classes=torch.tensor([0, 4, 4]))
    assert some.equal(indices[(classes == 0) | (classes == 4)])
    hits = torch.stack([torch.bincount(bank.draw(k)[0], minlength=200) for k in range(300)]).sum(0)
    assert (hits > 0).all()


class Data:
    "Ten numbers an image; augmentation is keyed noise."
    def __init__(self): self.images, self.labels = torch.randn(40, 10, generator=keyed_generator('images')), torch.arange(40) % 4
    def take(self, split, indices, *, augment='none', key=()):
        assert split == 'train' and augment == 'standard'
        return self.images[indices] + .1*torch.randn(len(indices), 10, generator=keyed_generator(*key))


def training(kind, every, rank, world):
    "Eight steps with a global batch of 11, uneven shares included; losses as seen here, and the final weights."
    data = Data()
    torch.manual_seed(0)
    net = torch.nn.Linear(10, 4)
    wrapped = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    method = objective('cmim', weight=2., count=5, centroids=kind, every=every, per_class=3, num_classes=4, train_labels=data.labels, seed=0)
    optimizer, losses = torch.optim.SGD(net.parameters(), .5), []
    for epoch in range(2):
        method.start_epoch(epoch)
        order = torch.randperm(40, generator=keyed_generator(0, 'shuffle', epoch))
        for step, whole in enumerate(order.split(11)):
            indices = whole[len(whole)*rank//world:len(whole)*(rank + 1)//world]
            images, labels = data.images[indices], data.labels[indices]
            batch = SimpleNamespace(images=images, labels=labels, indices=indices, epoch=epoch, step=step, seed=0, shares=(), augment='standard')
            with torch.no_grad(): method.before_step(lambda x: net(x).log_softmax(-1), data, batch)
            logits = wrapped(images)
            method.observe(*gather_over_processes(logits.detach().log_softmax(-1), labels, indices))
            loss = method(logits, None, labels, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), net.weight.detach(), method.bank.log_centroids


KINDS = [('memory', 1), ('batch', 1), ('resample', 1), ('resample', 3)]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    # groups of four images, so that both processes get some
    import cmim_repro.defenses.centroids as module
    module.GROUP = 4
    torch.save([training(kind, every, rank, world) for kind, every in KINDS], f'{folder}/{rank}.pt')
    end_together()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gloo')
    mp.spawn(worker, (2, str(folder)), nprocs=2)
    return [torch.load(folder/f'{rank}.pt') for rank in range(2)]


@pytest.mark.parametrize('which', range(len(KINDS)), ids=[f'{kind}-{every}' for kind, every in KINDS])
def test_two_processes_equal_one(two_processes, which, monkeypatch):
    monkeypatch.setattr('cmim_repro.defenses.centroids.GROUP', 4)
    losses, weight, log_centroids = training(*KINDS[which], 0, 1)
    both = [results[which] for results in two_processes]
    torch.testing.assert_close((both[0][0] + both[1][0])/2, losses, rtol=1e-5, atol=1e-6)
    for _, weight_there, log_centroids_there in both:
        torch.testing.assert_close(weight_there, weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(log_centroids_there, log_centroids, rtol=1e-4, atol=1e-5)
    # and the term matters: plain cross-entropy ends elsewhere
    assert losses[0] > 0 and not torch.allclose(weight, training_without_term(), atol=1e-3)


def training_without_term():
    torch.manual_seed(0)
    data, net = Data(), torch.nn.Linear(10, 4)
    optimizer = torch.optim.SGD(net.parameters(), .5)
    for epoch in range(2):
        for whole in torch.randperm(40, generator=keyed_generator(0, 'shuffle', epoch)).split(11):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(data.images[whole]), data.labels[whole]).backward()
            optimizer.step()
    return net.weight.detach()


@pytest.mark.parametrize('kind', ['memory', 'batch', 'resample'])
def test_killed_and_resumed_is_bit_for_bit(kind):
    "A second object that starts from the first one's state continues with the same losses."
    data = Data()
    make = lambda: objective('cmim', weight=2., count=5, centroids=kind, per_class=3, num_classes=4, train_labels=data.labels, seed=0)
    logits = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(0))
    def epoch(method, e):
        method.start_epoch(e)
        batch = SimpleNamespace(labels=data.labels[:20], epoch=e, step=0, seed=0, shares=(), augment='standard')
        method.before_step(lambda x: x[:, :4].log_softmax(-1), data, batch)
        method.observe(logits[e, :20].log_softmax(-1), data.labels[:20], torch.arange(20))
        return method(logits[e, :20], None, data.labels[:20])
    first = make()
    epoch(first, 0); epoch(first, 1)
    second = make()
    second.load_state_dict(first.state_dict())
    assert torch.equal(epoch(first, 2), epoch(second, 2))
