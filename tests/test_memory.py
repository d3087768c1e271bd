"What a step takes besides arithmetic: memory, measured as every operation allocates it, and places where an accelerator would have to wait."
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from cmim_repro.attacks.core import attack
from cmim_repro.core import keyed_generator
from cmim_repro.defenses.centroids import memory_bank_bytes
from cmim_repro.defenses.core import objective
from cmim_repro.lab.data.core import Crop, Facts, Flip, Rotation, TensorDataSet
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Batch, Learner, Recipe, Settings, initialised


class Live(TorchDispatchMode):
    "Bytes of the tensors made inside that are still alive: now, at most, and the largest single one."
    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for ref in [ref for ref in self.alive if ref.expired()]: self.now -= self.alive.pop(ref)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in given: continue
            size, ref = tensor.untyped_storage().nbytes(), StorageWeakRef(tensor.untyped_storage())
            if ref not in self.alive: self.now += size
            self.alive[ref], self.largest = size, max(self.largest, size)
        self.peak = max(self.peak, self.now)
        return result


def test_the_meter_sees_what_lives_and_what_has_gone():
    with Live() as live:
        a = torch.zeros(1000)
        b = (a + 1).view(10, 100).t() # a view allocates nothing
        c = torch.exp(torch.exp(b)) # the inner one lives only meanwhile
        a.add_(1)
        del b
        torch.zeros(())
    assert (live.now, live.peak, live.largest) == (2 * 4000 + 4, 3 * 4000 + 4000, 4000) and len(c) == 100


@pytest.mark.parametrize('kind', ['memory', 'batch', 'resample'])
def test_imagenets_term_stays_within_two_gigabytes(kind, monkeypatch):
    "C = 1000, N = 50, batch 256, in the portions that a CUDA device is given; on such a device `test_cmim_banks` measures it."
    for place in ('defenses.centroids', 'theory.objective'):
        monkeypatch.setattr(f'cmim_repro.{place}.powers_at_once', lambda device, elements: max(1, 2**24 // max(1, elements)))
    B, C, count, samples = 256, 1000, 50, 4000
    labels, z = torch.arange(samples) % C, torch.randn(B, C, requires_grad=True)
    fresh = [(torch.randn(B, C).log_softmax(-1), labels[:B])]
    with Live() as live:
        method = objective('cmim', count=count, centroids=kind, per_class=4, num_classes=C, train_labels=labels, seed=0)
        indices = torch.randperm(samples)[:B]
        for epoch in range(2 if kind == 'memory' else 1):
            method.start_epoch(epoch)
            if kind == 'resample': method.bank.replace(fresh)
            method.observe(z.detach().log_softmax(-1), labels[indices], indices)
            method(z, None, labels[indices]).backward()
    stored = samples * (4 * C + 9) if kind == 'memory' else 0
    sums = memory_bank_bytes(samples, C, count) - samples * (4 * C + 9)
    print(f'{kind}: {live.peak/1e6:.0f} MB at most, {stored/1e6:.0f} of it stored outputs; largest tensor {live.largest/1e6:.0f}, sums {sums/1e6:.0f}')
    assert sums < live.peak - stored < 2e9 and live.largest <= sums and z.grad.isfinite().all()


def test_the_memory_of_the_term_does_not_grow_with_the_number_of_samples(monkeypatch):
    "Rebuilding the sums for new powers goes through the stored outputs in portions."
    peaks = []
    for samples in (2000, 8000):
        labels = torch.arange(samples) % 20
        method = objective('cmim', count=10, num_classes=20, train_labels=labels, seed=0)
        method.start_epoch(0)
        method.observe(torch.randn(samples, 20).log_softmax(-1), labels, torch.arange(samples))
        with Live() as live: method.start_epoch(1)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] < 6000 * 32 # positions and labels of the samples, not N C numbers of each


# ---- waits

WAITS = {'aten::_local_scalar_dense', 'aten::is_nonzero', 'aten::nonzero', 'aten::masked_select', 'aten::equal', 'aten::_unique2', 'aten::bincount',
         'aten::repeat_interleave', 'aten::lift_fresh', 'aten::allclose'}


class NoWaiting(TorchDispatchMode):
    "Refuses operations whose result's size or value the host must know, and tensors written down on the host."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition('.')[0]
        masks = name in ('aten::index', 'aten::index_put', 'aten::index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in WAITS and not masks, f'{func.name()} makes the host wait for the device'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('call', [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.sum() > 0), lambda x: x.add_(torch.tensor(1.)),
                                  lambda x: x.nonzero(), lambda x: x.__setitem__(x > 0, torch.ones(3)), lambda x: torch.equal(x, x)])
def test_the_watchman_notices(call):
    with pytest.raises(AssertionError, match='makes the host wait'), NoWaiting(): call(torch.ones(3))


def pictures(count=64):
    facts = Facts('noise', [f'class {i}' for i in range(8)], (.4, .5, .6), (.2, .3, .25), (Rotation(20), Crop(3, 'edge'), Flip()))
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=keyed_generator(0, 'pictures'))
    return TensorDataSet(facts, {'train': images}, {'train': torch.arange(count) % 8})


def unwatched(call):
    "Adam counts its steps in tensors that stay on the host."
    def quietly():
        with _disable_current_modes(): return call()
    return quietly


METHODS = [(objective, 'ce', {}), (objective, 'ls', {}), (objective, 'cmim', {}), (objective, 'cmim', {'centroids': 'batch'}),
           *[(attack, name, {}) for name in ('kd', 'mkd', 'dkd', 'dist', 'htc', 'avg', 'knockoff', 'anchored', 'ttm', 'wttm', 'standardised', 'amplified',
                                                 'mixup', 'extra', 'unmixed')]]


@pytest.mark.parametrize('registry, name, options', METHODS, ids=lambda v: v if isinstance(v, str) else '')
def test_nothing_in_a_step_waits_for_the_device(registry, name, options):
    data = pictures()
    context = {'num_classes': 8, 'train_labels': data.labels('train'), 'seed': 0, 'image_shape': data.image_shape}
    loss = registry(name, **options, **{k: v for k, v in context.items() if k in registry.context(name)})
    learner = Learner(name, initialised(lambda: model('cnn_tiny', num_classes=8, image_shape=data.image_shape), 0), loss, Recipe(batch_size=16))
    learner.place(torch.device('cpu'), Settings()).start_epoch()
    if learner.own_optimizer: learner.own_optimizer.step = unwatched(learner.own_optimizer.step)
    batches = data.batches('train', 16, augment='standard', shuffle=True)
    for step, (images, labels, places) in enumerate(batches):
        answers = torch.randn(16, 8, generator=keyed_generator(step)).log_softmax(-1)
        batch = Batch(images, labels, places, answers, 0, 0, step)
        with NoWaiting() if step else nullcontext(): learner.step(batch, data, 4) # the first batch is looked at
