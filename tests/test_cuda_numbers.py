"""Attacks, CMIM's term and CMI on a CUDA device: the numbers of the CPU, within the memory of ImageNet's size. It needs pytest and the package alone."""
import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import keyed_generator
from cmim_repro.defenses.core import objective
from cmim_repro.theory.cmi import CMIAccumulator, cmi_curve
from cmim_repro.theory.theorem2 import cmi_derivative

DEVICE = 'cuda'
pytestmark = pytest.mark.cuda
VARIANTS = [(name, variant) for name in attack.names() for variant in attack.variants(name)]


@pytest.mark.parametrize('name,variant', VARIANTS)
def test_an_attack_is_the_same(name, variant):
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64, generator=keyed_generator(0, 'answers'))
    teacher, labels = teacher.log_softmax(1), torch.arange(8)
    module = attack(name, variant, **({'num_classes': 10} if 'num_classes' in attack.context(name) else {})).double()
    here = module(student, teacher, labels, 3)
    there = module.to(DEVICE)(student.to(DEVICE), teacher.to(DEVICE), labels.to(DEVICE), 3)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('kind', ['memory', 'batch', 'resample'])
def test_a_step_of_imagenets_size_within_two_gigabytes(kind):
    B, C, count, samples = 256, 1000, 50, 20_000
    labels = torch.arange(samples, device=DEVICE) % C
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    method = objective('cmim', count=count, centroids=kind, num_classes=C, train_labels=labels, seed=0).to(DEVICE)
    indices = torch.randperm(samples, device=DEVICE)[:B]
    z = torch.randn(B, C, device=DEVICE, requires_grad=True)
    for epoch in range(2):
        method.start_epoch(epoch)
        if kind == 'resample': method.bank.replace([(z.detach().log_softmax(-1), labels[indices])])
        method.observe(z.detach().log_softmax(-1), labels[indices], indices)
        method(z, None, labels[indices]).backward()
    stored = samples*(4*C + 9) if kind == 'memory' else 0
    extra = torch.cuda.max_memory_allocated() - start - stored
    print(f'{kind}: {extra/1e9:.2f} GB beside the stored outputs')
    assert extra < 2e9 and z.grad.isfinite().all()


def close(actual, expected): torch.testing.assert_close(actual.cpu(), expected, rtol=1e-8, atol=1e-13)


def test_cmi_is_the_same_and_sums_do_not_depend_on_their_order():
    log_probs = torch.randn(500, 20, dtype=torch.float64, generator=keyed_generator(0, 'log_probs')).log_softmax(-1)
    labels, alphas = torch.arange(500) % 20, torch.linspace(0, 4, 9, dtype=torch.float64)
    there = log_probs.to(DEVICE), labels.to(DEVICE)
    curve = cmi_curve(log_probs, labels, alphas, True)
    close(cmi_curve(*there, alphas, True), curve)
    close(cmi_derivative(*there, alphas.to(DEVICE).expand(20, -1)), cmi_derivative(log_probs, labels, alphas.expand(20, -1)))
    batches = [CMIAccumulator(alphas, 20, device=DEVICE).update(x, y) for x, y in zip(there[0].split(100), there[1].split(100), strict=True)]
    forward, backward = CMIAccumulator(alphas, 20, device=DEVICE), CMIAccumulator(alphas, 20, device=DEVICE)
    for batch in batches: forward.merge(batch)
    for batch in reversed(batches): backward.merge(batch)
    assert torch.equal(forward.sums, backward.sums)
    close(forward.class_cmi(), curve)
