"""The CMIM objective against values computed at 40 digits (golden/cmim.npz) and the CMI loss of earlier public code (golden/cmi.npz)."""
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmim_repro.core import Invalid
from cmim_repro.defenses.centroids import BatchBank, MemoryBank
from cmim_repro.defenses.cmim import CMIM
from cmim_repro.theory.objective import cmim_regularizer, draw_powers

GOLDEN = Path(__file__).parent/'golden'


def load(name):
    with np.load(GOLDEN/name, allow_pickle=False) as file: arrays = {k: torch.as_tensor(file[k]) for k in file.files}
    return {case: {k.split('__')[1]: v for k, v in arrays.items() if k.startswith(case + '__')} for case in sorted({k.split('__')[0] for k in arrays})}


CMIM_CASES, CMI_CASES = load('cmim.npz'), load('cmi.npz')


def full(per_class, classes, C):
    "Log-centroids (C, N, C) from those of the classes present, (n, N, C); absent classes are NaN, so that reading them shows."
    result = torch.full((C, *per_class.shape[1:]), math.nan, dtype=per_class.dtype)
    result[classes] = per_class.log()
    return result


def tolerance(case, dtype):
    if dtype == torch.float64: return {'rtol': 1e-8, 'atol': 1e-15}
    return {'rtol': 1e-4, 'atol': 2e-6} if 'ext' not in case else {'rtol': 1e-3, 'atol': 1e-4}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('chunk', [0, 1, 2])
@pytest.mark.parametrize('kind', ['Q', 'centroid'])
@pytest.mark.parametrize('case', CMIM_CASES)
def test_value_and_gradient(case, kind, chunk, dtype):
    g = CMIM_CASES[case]
    z = g['logits'].to(dtype).requires_grad_()
    Q = full(g['Q' if kind == 'Q' else 'centroids'], g['classes'], z.shape[1]).to(dtype)
    value = cmim_regularizer(z, g['labels'], Q, g['alphas'].to(dtype), float(g['lam']), float(g['omega']), chunk=chunk)
    close = tolerance(case, dtype)
    torch.testing.assert_close(value, g[f'reg_{kind}'].to(dtype), **close)
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], g[f'reg_grad_logits_{kind}'].to(dtype), **close)
    torch.testing.assert_close(F.cross_entropy(z, g['labels']), g['ce'].to(dtype), **close)
    torch.testing.assert_close(F.cross_entropy(z, g['labels']) + value, g[f'objective_{kind}'].to(dtype), **close)


@pytest.mark.parametrize('case', CMIM_CASES)
def test_divergence_of_each_class(case):
    "With one power and lambda 1 the term is the mean of class_kl_to_Q over the classes, by share."
    g = CMIM_CASES[case]
    Q = full(g['Q'], g['classes'], g['logits'].shape[1])
    for row, y in enumerate(g['classes']):
        mine = g['labels'] == y
        for i, alpha in enumerate(g['alphas']):
            K = cmim_regularizer(g['logits'][mine], g['labels'][mine], Q[:, i:i + 1], alpha[None], 1., 25.)
            torch.testing.assert_close(K, g['class_kl_to_Q'][row, i], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize('case', CMIM_CASES)
def test_batch_bank_and_objective(case):
    g = CMIM_CASES[case]
    C, N = g['logits'].shape[1], len(g['alphas'])
    bank = BatchBank(C, N).double()
    bank.start_epoch(g['alphas'])
    bank.observe(g['logits'].log_softmax(-1), g['labels'])
    torch.testing.assert_close(bank.log_centroids[g['classes']].exp(), g['centroids'], rtol=1e-8, atol=1e-290)
    method = CMIM(weight=float(g['lam']), omega=float(g['omega']), count=N, centroids='batch', num_classes=C)
    method.bank = bank
    z = g['logits'].clone().requires_grad_()
    loss = method(z, None, g['labels'])
    torch.testing.assert_close(loss, g['objective_centroid'], rtol=1e-8, atol=1e-14)
    gradient = torch.autograd.grad(loss - F.cross_entropy(z, g['labels']), z)[0]
    torch.testing.assert_close(gradient, g['reg_grad_logits_centroid'], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize('case', CMI_CASES)
def test_earlier_cmi_loss(case):
    "One power, 1, and lambda 1: the CMI of the authors' earlier code, with centroids fixed."
    g, one = CMI_CASES[case], torch.ones(1, dtype=torch.float64)
    for Q, value, gradient in (('centroids', 'cmi', 'cmi_grad_fixed_centroids'), ('Q', 'kl_to_Q', 'kl_to_Q_grad')):
        z = g['teacher_logits'].clone().requires_grad_()
        loss = sum(cmim_regularizer(z[i:i + 1], g['labels'][i:i + 1], g[Q].log()[:, None], one, 1., 25.) for i in range(len(z)))/len(z)
        torch.testing.assert_close(loss, g[value], rtol=1e-8, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], g[gradient], rtol=1e-8, atol=1e-13)
        whole = cmim_regularizer(z, g['labels'], g[Q].log()[:, None], one, 1., 25.)
        torch.testing.assert_close(whole, g[value], rtol=1e-8, atol=1e-13)


def plain(z, labels, log_q, powers, weight, omega):
    "Eq. 28's second term by loops; log_q a list per class of (N, C)."
    total = 0
    for y in labels.unique().tolist():
        log_p = (powers[:, None, None]*z[labels == y]).log_softmax(-1)
        q = log_p.exp().mean(1).log() if log_q is None else log_q[y]
        K = (log_p.exp()*(log_p - q[:, None])).sum(-1).mean(1)
        total = total + (labels == y).double().mean()*((omega*K).logsumexp(0) - math.log(len(K)))/omega
    return weight*total


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 9), C=st.integers(2, 7), N=st.integers(1, 6), scale=st.floats(.1, 12), omega=st.floats(.5, 200), seed=st.integers(0, 10**6))
def test_fast_equals_plain_and_envelope(B, C, N, scale, omega, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (scale*torch.randn(B, C, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(C, (B,), generator=generator)
    powers = 2*torch.rand(N, generator=generator, dtype=torch.float64)
    Q = torch.randn(C, N, C, generator=generator, dtype=torch.float64).log_softmax(-1)
    slow = plain(z, labels, Q, powers, .7, omega)
    fast = cmim_regularizer(z, labels, Q, powers, .7, omega, chunk=1 + seed % 3)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(fast, z)[0], torch.autograd.grad(slow, z)[0], rtol=1e-8, atol=1e-13)
    # the gradient through the centroids equals the one that takes them for constants
    bank = BatchBank(C, N).double()
    bank.start_epoch(powers)
    bank.observe(z.log_softmax(-1), labels)
    through = torch.autograd.grad(plain(z, labels, None, powers, .7, omega), z)[0]
    constant = torch.autograd.grad(cmim_regularizer(z, labels, bank.rows, powers, .7, omega), z)[0]
    torch.testing.assert_close(constant, through, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('chunk', [0, 1, 2])
def test_gradcheck(chunk):
    z = (2*torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    Q = torch.randn(4, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    labels, powers = torch.tensor([0, 0, 1, 3, 3, 3]), draw_powers(5, key=(0,)).double()
    assert torch.autograd.gradcheck(lambda z: cmim_regularizer(z, labels, Q, powers, .5, 25., chunk=chunk), z)


def test_power_zero_and_single_samples_give_nothing():
    z = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 1, 2, 2])
    bank = BatchBank(3, 2).double()
    bank.start_epoch(torch.zeros(2))
    bank.observe(z.log_softmax(-1), labels)
    loss = cmim_regularizer(z, labels, bank.rows, bank.powers, 1., 25.)
    assert abs(loss) < 1e-14 and torch.autograd.grad(loss, z)[0].abs().max() == 0
    bank.start_epoch(torch.tensor([.5, 1.5]))
    bank.observe(z[:1].log_softmax(-1), labels[:1])
    loss = cmim_regularizer(z[:1], labels[:1], bank.rows, bank.powers, 1., 25.)
    assert abs(loss) < 1e-14 and torch.autograd.grad(loss, z)[0].abs().max() < 1e-14


def test_naive_exponential_overflows_where_the_stable_one_does_not():
    generator = torch.Generator().manual_seed(0)
    z, labels = (9*torch.randn(16, 10, generator=generator)).requires_grad_(), torch.randint(10, (16,), generator=generator)
    Q, powers = torch.randn(10, 25, 10, generator=generator).log_softmax(-1), draw_powers(25, kind='grid')
    overflown = cmim_regularizer(z, labels, Q, powers, .5, 40., naive_exp=True)
    assert overflown == math.inf and torch.autograd.grad(overflown, z)[0].isnan().any()
    for omega in (40., 4000.):
        stable = cmim_regularizer(z, labels, Q, powers, .5, omega)
        assert stable.isfinite() and torch.autograd.grad(stable, z)[0].isfinite().all()
    gentle = [cmim_regularizer(z, labels, Q, powers, .5, 2., naive_exp=naive) for naive in (True, False)]
    torch.testing.assert_close(*gentle)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in gentle))


def test_logits_may_be_log_probabilities_with_exact_zeros():
    log_probs = torch.tensor([[.5, .5, 0, 0], [.2, .3, .5, 0]], dtype=torch.float64).log()
    Q = torch.full((4, 2, 4), -math.log(4), dtype=torch.float64)
    K = cmim_regularizer(log_probs, torch.tensor([0, 0]), Q[:, :1], torch.ones(1), 1., 25.)
    entropy = (math.log(2) - .2*math.log(.2) - .3*math.log(.3) - .5*math.log(.5))/2
    assert abs(K - (math.log(4) - entropy)) < 1e-12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    z = (3*torch.randn(8, 5)).to(dtype).requires_grad_()
    labels, Q, powers = torch.arange(8) % 5, torch.randn(5, 4, 5).log_softmax(-1), draw_powers(4)
    with torch.autocast('cpu', torch.bfloat16): loss = cmim_regularizer(z, labels, Q, powers, .5, 25.)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cmim_regularizer(z.float(), labels, Q, powers, .5, 25.))
    loss.backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all()


class PeakBytes(TorchDispatchMode):
    "Counts the bytes of all storages made inside that are alive at the same time."
    def __init__(self): super().__init__(); self.now = self.peak = 0; self.known = weakref.WeakSet()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # an in-place operation returns an argument: nothing new
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old: self._made(t.untyped_storage())
        return result
    def _made(self, storage):
        if storage in self.known: return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)
    def _freed(self, size): self.now -= size


def test_peak_counter_counts():
    with PeakBytes() as peak:
        for _ in range(3): torch.zeros(1000).add_(1)
        kept = torch.zeros(500) + 1
    assert peak.peak in range(4000, 8001) and kept is not None


@pytest.mark.parametrize('kind', ['tensor', 'batch', 'memory'])
def test_memory_of_an_imagenet_step(kind, monkeypatch):
    "C = 1000, N = 50, batch 256: below 2 GB even with an accelerator's chunks, and (B, C) numbers saved for the backward pass."
    B, C, N = 256, 1000, 50
    z, labels, powers = torch.randn(B, C, requires_grad=True), torch.randint(C, (B,)), draw_powers(N)
    for place in ('defenses.centroids', 'theory.objective'):
        monkeypatch.setattr(f'cmim_repro.{place}.powers_at_once', lambda device, elements: max(1, 2**24//max(1, elements)))
    saved, samples = [], 2*B
    Q = torch.randn(C, N, C) if kind == 'tensor' else None
    with PeakBytes() as peak, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        if kind != 'tensor':
            Q = BatchBank(C, N) if kind == 'batch' else MemoryBank(labels.repeat(2), C, N)
            for _ in range(2):
                Q.start_epoch(powers)
                Q.observe(z.log_softmax(-1), labels, torch.arange(B))
        cmim_regularizer(z, labels, Q if kind == 'tensor' else Q.rows, powers, .5, 25.).backward()
    stored = 4*C*samples if kind == 'memory' else 0
    print(f'{kind}: peak {peak.peak/1e6:.0f} MB, {stored/1e6:.0f} MB of it stored outputs, saved for backward {sum(saved)/1e6:.2f} MB')
    assert 50e6 < peak.peak - stored < 1.5e9
    assert sum(saved) <= 6*4*B*C


def test_bad_input_is_one_sentence():
    z, labels, Q, powers = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.zeros(3, 2, 3), torch.ones(2)
    good = dict(logits=z, labels=labels, log_centroids=Q, powers=powers, weight=.5, omega=25.)
    for change, message in [({'weight': -.1}, 'lambda'), ({'weight': math.nan}, 'lambda'), ({'omega': 0}, 'omega'), ({'omega': math.inf}, 'omega'),
                            ({'powers': torch.ones(3)}, 'log_centroids'), ({'powers': torch.ones(0)}, 'powers'), ({'logits': z[0]}, 'logits'),
                            ({'labels': labels[:3]}, 'labels'), ({'labels': labels.float()}, 'labels'), ({'log_centroids': Q[:2]}, 'log_centroids')]:
        with pytest.raises(Invalid, match=message) as error: cmim_regularizer(**{**good, **change})
        assert '\n' not in str(error.value)
