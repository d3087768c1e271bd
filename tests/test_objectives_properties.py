"""What theory says of every way to train a teacher, on inputs that hypothesis chooses."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.defenses.core import objective

quick = settings(max_examples=40, deadline=None)
METHODS = [(name, variant) for name in ('ce', 'ls', 'nt', 'snt', 'apgp', 'cmim') for variant in objective.variants(name)
           if (name, variant) not in (('cmim', 'paper'), ('cmim', 'table9'))] # these two differ by their bank of centroids, not by the loss
CLIPPED = [('nt', {'clip': 5.}), ('apgp', {'clip': 5.})]


def make(name, variant='recommended', C=2, groups=None, labels=None, **options):
    if name == 'snt': options |= {'num_classes': C, 'superclasses': groups}
    if name == 'cmim': options |= {'num_classes': C, 'train_labels': labels, 'centroids': 'batch', 'count': 5}
    return objective(name, variant, **options)


def value_of(module, logits, teacher, labels):
    module.observe(logits.detach().log_softmax(-1), labels, torch.arange(len(labels)))
    return module(logits, teacher, labels, 0)


@st.composite
def batches(draw, dtypes=(torch.float32, torch.float64)):
    "Logits, a teacher's log-probabilities (sometimes with exact zeros) and labels: B from 1, C from 2, logits up to 50"
    B, C, dtype, scale = draw(st.integers(1, 6)), draw(st.integers(2, 12)), draw(st.sampled_from(dtypes)), draw(st.sampled_from([0., 1., 10., 50.]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits, teacher = (2*torch.rand(2, B, C, generator=random, dtype=dtype) - 1) * scale
    if draw(st.booleans()): teacher[:, 1:][torch.rand(B, C - 1, generator=random) < .3] = -math.inf
    return logits, teacher.log_softmax(1), torch.randint(C, (B,), generator=random)


@pytest.mark.parametrize('name, variant', METHODS)
@quick
@given(batch=batches())
def test_value_and_gradient_are_finite(name, variant, batch):
    logits, teacher, labels = batch
    if name == 'nt': teacher = teacher.clamp_min(-200).log_softmax(-1) # KL from the nasty network to a zero is infinite by right; networks have no zeros
    logits = logits.clone().requires_grad_()
    module = make(name, variant, logits.shape[1], [k // 2 for k in range(logits.shape[1])], labels)
    value = value_of(module, logits, teacher, labels)
    value.backward()
    assert value.ndim == 0 and value.isfinite() and logits.grad.isfinite().all()
    if name in ('ce', 'ls', 'cmim'): assert value >= -1e-6
    if logits.dtype == torch.float64: assert logits.grad.sum(-1).abs().max() < 1e-9 # no loss sees a constant added to all logits


@pytest.mark.parametrize('name, options', CLIPPED)
@quick
@given(batch=batches(dtypes=(torch.float64,)))
def test_a_clipped_reward_is_bounded_below(name, options, batch):
    logits, teacher, labels = batch
    module = make(name, **options)
    reward = module.weight * 5 * getattr(module, 'temperature', 1.)**2
    assert module(logits, teacher.clamp_min(-200).log_softmax(-1), labels) >= -reward - 1e-9


@pytest.mark.parametrize('name, variant', METHODS)
@quick
@given(batch=batches(dtypes=(torch.float64,)), key=st.integers(0, 2**31))
def test_names_of_classes_do_not_matter(name, variant, batch, key):
    "SNT's classes have structure: there the structure is renamed with them."
    logits, teacher, labels = batch
    if name == 'nt': teacher = teacher.clamp_min(-200).log_softmax(-1)
    C = logits.shape[1]
    order, groups = torch.randperm(C, generator=torch.Generator().manual_seed(key)), torch.arange(C) // 2
    renamed = order.argsort()[labels]
    expected = value_of(make(name, variant, C, groups.tolist(), labels), logits, teacher, labels)
    got = value_of(make(name, variant, C, groups[order].tolist(), renamed), logits[:, order], teacher[:, order], renamed)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', ['nt', 'apgp'])
@quick
@given(batch=batches(dtypes=(torch.float64,)))
def test_being_the_other_network_earns_nothing(name, batch):
    "Where the network answers what the one it turns away from answers, the divergence and its gradient vanish: cross-entropy is left."
    _, teacher, labels = batch
    other = teacher.clamp_min(-200).log_softmax(-1)
    logits = other.clone().requires_grad_()
    value, plain = (module(logits, other, labels) for module in (make(name, weight=1.), objective('ce')))
    torch.testing.assert_close(value, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (value, plain)), rtol=0, atol=1e-9)
