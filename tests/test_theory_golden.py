"Theory against golden vectors (40-digit evaluations of the paper's formulas, and the earlier CMI code), and properties that hold for any input."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.theory.cmi import CMIAccumulator, class_centroids, class_cmi, cmi, cmi_curve
from cmim_repro.theory.distributions import entropy, kl, log_mixture, power_transform
from cmim_repro.theory.theorem1 import log_mean_exp
from cmim_repro.theory.theorem2 import cmi_curvature, cmi_derivative

GOLDEN = Path(__file__).parent/'golden'


def load(name):
    "Cases of a golden file, each a dictionary of tensors."
    cases = {}
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as file:
        for key in file.files:
            case, array = key.split('__', 1)
            cases.setdefault(case, {})[array] = torch.from_numpy(file[key])
    return cases


CMIM, CMI = load('cmim'), load('cmi')
PRECISIONS = [(f, c, d) for f, cases in (('cmim', CMIM), ('cmi', CMI)) for c in cases for d in (torch.float64, torch.float32)
              if d == torch.float64 or not c.endswith('ext')]


def of(name): return [p[1:] for p in PRECISIONS if p[0] == name]


def close(actual, expected, zero=1e-14):
    "rtol 1e-8 in float64 and 1e-4 in float32; `zero` is the absolute error allowed in float64 where the truth is 0."
    double = actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-8 if double else 1e-4, atol=zero if double else 1e-6)


def test_the_golden_files_hold_what_is_tested():
    assert len(CMIM) == 6 and len(CMI) == 6
    inputs = {'logits', 'labels', 'alphas', 'omega', 'lam', 'beta', 'classes', 'Q'}
    here = {'power_probs', 'centroids', 'class_cmi', 'class_cmi_dalpha', 'class_kl_to_Q', 'class_cmi_max_over_alphas', 'class_cmi_logmeanexp', 'overall_cmi_per_alpha'}
    with_the_objective = {'ce'} | {f'{what}_{kind}' for what in ('reg', 'objective', 'reg_grad_logits') for kind in ('Q', 'centroid')}
    for g in CMIM.values(): assert set(g) == inputs | here | with_the_objective and (g['alphas'] <= g['beta']).all()
    earlier = {'student_logits', 'teacher_logits', 'labels', 'Q', 'ce', 'centroids', 'cmi', 'cmi_grad_fixed_centroids', 'kl_to_Q', 'kl_to_Q_grad'}
    for g in CMI.values(): assert set(g) == earlier
    assert sum(c.endswith('ext') for c in (*CMIM, *CMI)) == 2


def cmim_inputs(case, dtype):
    g = CMIM[case]
    log_probs = g['logits'].to(dtype).log_softmax(-1)
    return g, log_probs, g['labels'], g['alphas'].to(dtype).expand(log_probs.shape[1], -1), g['classes']


@pytest.mark.parametrize('case, dtype', of('cmim'))
def test_power_transform_and_centroids(case, dtype):
    g, log_probs, labels, alphas, classes = cmim_inputs(case, dtype)
    close(power_transform(log_probs[:, None], alphas[0, :, None]).exp(), g['power_probs'], zero=0)
    centroids = class_centroids(log_probs, labels, alphas)
    close(centroids[classes].exp(), g['centroids'], zero=0)
    for n, y in enumerate(classes.tolist()):
        mixture = log_mixture(power_transform(log_probs[labels == y, None], alphas[0, :, None]))
        close(mixture.exp(), g['centroids'][n], zero=0)
    absent = torch.ones(len(centroids), dtype=torch.bool).index_fill(0, classes, False)
    assert centroids[absent].isnan().all()


@pytest.mark.parametrize('case, dtype', of('cmim'))
def test_class_cmi_its_maximum_and_smooth_maximum(case, dtype):
    g, log_probs, labels, alphas, classes = cmim_inputs(case, dtype)
    values = class_cmi(log_probs, labels, alphas)[classes]
    close(values, g['class_cmi'])
    close(values.max(1).values, g['class_cmi_max_over_alphas'])
    close(log_mean_exp(values, g['omega'].item()), g['class_cmi_logmeanexp'])
    close(cmi(log_probs, labels, alphas), g['overall_cmi_per_alpha'])
    for i, alpha in enumerate(g['alphas'].tolist()): close(class_cmi(log_probs, labels, alpha)[classes], g['class_cmi'][:, i])


@pytest.mark.parametrize('case', CMIM)
def test_single_pass(case):
    g, log_probs, labels, alphas, classes = cmim_inputs(case, torch.float64)
    accumulator = CMIAccumulator(g['alphas'], log_probs.shape[1])
    for row in range(len(labels)): accumulator.update(log_probs[row:row + 1], labels[row:row + 1])
    for per_class, expected in (True, 'class_cmi'), (False, 'overall_cmi_per_alpha'):
        curve, streamed = cmi_curve(log_probs, labels, g['alphas'], per_class), accumulator.class_cmi() if per_class else accumulator.cmi()
        close(curve[classes] if per_class else curve, g[expected], zero=1e-14)
        close(streamed[classes] if per_class else streamed, g[expected], zero=1e-14)


@pytest.mark.parametrize('case, dtype', of('cmim'))
def test_derivative(case, dtype):
    g, log_probs, labels, alphas, classes = cmim_inputs(case, dtype)
    expected = g['class_cmi_dalpha']
    assert torch.equal(expected.isnan(), (g['alphas'] == 0).expand_as(expected))
    close(cmi_derivative(log_probs, labels, alphas)[classes], expected.nan_to_num(0))


@pytest.mark.parametrize('case, dtype', of('cmim'))
def test_divergence_from_any_distribution(case, dtype):
    g, log_probs, labels, alphas, classes = cmim_inputs(case, dtype)
    for n, y in enumerate(classes.tolist()):
        log_p = power_transform(log_probs[labels == y, None], alphas[0, :, None])
        close(kl(log_p, g['Q'][n].to(dtype).log()).mean(0), g['class_kl_to_Q'][n])


@pytest.mark.parametrize('case, dtype', of('cmi'))
def test_the_earlier_cmi_code(case, dtype):
    g = CMI[case]
    logits, labels = g['teacher_logits'].to(dtype).requires_grad_(), g['labels']
    log_probs = logits.log_softmax(-1)
    seen = labels.unique()
    centroids = class_centroids(log_probs, labels)
    close(centroids[seen].exp().detach(), g['centroids'][seen], zero=1e-300)
    close(cmi(log_probs, labels).detach(), g['cmi'])
    for log_q, value, gradient in (centroids.detach(), 'cmi', 'cmi_grad_fixed_centroids'), (g['Q'].to(dtype).log(), 'kl_to_Q', 'kl_to_Q_grad'):
        loss = kl(log_probs, log_q[labels]).mean()
        close(loss.detach(), g[value])
        close(torch.autograd.grad(loss, logits, retain_graph=True)[0], g[gradient])
    # the centroid minimises the mean divergence, so its own gradient is no part of the whole
    close(torch.autograd.grad(cmi(log_probs, labels), logits)[0], g['cmi_grad_fixed_centroids'])


@st.composite
def samples(draw, sparse=True):
    "Log-probabilities, labels and a power; some with exact zeros, some nearly one-hot, some classes without samples."
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    B, C = draw(st.integers(1, 24)), draw(st.integers(2, 12))
    logits = torch.randn(B, C, dtype=torch.float64, generator=generator) * draw(st.sampled_from([1e-3, 1., 10., 100.]))
    if sparse and draw(st.booleans()):
        drop = torch.rand(B, C, generator=generator) < .4
        drop[:, 0] = False
        logits = logits.masked_fill(drop, -math.inf)
    labels = torch.randint(0, draw(st.integers(1, C)), (B,), generator=generator)
    return logits.log_softmax(-1), labels, draw(st.sampled_from([0., 1e-3, .25, 1., 4., 50.])), generator


@settings(deadline=None, max_examples=100)
@given(samples())
def test_cmi_is_between_zero_and_the_entropy_of_the_centroid(sample):
    log_probs, labels, alpha, _ = sample
    values, seen = class_cmi(log_probs, labels, alpha), labels.unique()
    centroids = class_centroids(log_probs, labels, alpha)
    assert values[seen].min() >= -1e-14 and (values[seen] <= entropy(centroids[seen]) + 1e-13).all()
    assert torch.equal(values.isnan(), ~torch.isin(torch.arange(len(values)), seen))
    weights = torch.bincount(labels, minlength=len(values)).double() / len(labels)
    close(cmi(log_probs, labels, alpha), (values.nan_to_num(0) * weights).sum(), zero=1e-13)


@settings(deadline=None, max_examples=60)
@given(samples())
def test_relabelling_classes_relabels_cmi(sample):
    log_probs, labels, alpha, generator = sample
    order = torch.randperm(log_probs.shape[1], generator=generator)
    original, renamed = class_cmi(log_probs, labels, alpha), class_cmi(log_probs[:, order], order.argsort()[labels], alpha)
    close(renamed, original[order], zero=1e-13)
    rows = torch.randperm(len(labels), generator=generator)
    close(class_cmi(log_probs[rows], labels[rows], alpha), original, zero=1e-13)


@settings(deadline=None, max_examples=60)
@given(samples())
def test_a_collapsed_cluster_has_no_cmi(sample):
    log_probs, labels, alpha, _ = sample
    first = torch.stack([(labels == y).nonzero()[0, 0] for y in labels])
    values = class_cmi(log_probs[first], labels, alpha)
    assert values[labels].abs().max() < 1e-13
    assert cmi_derivative(log_probs[first], labels, alpha)[labels].abs().max() < 1e-11


@settings(deadline=None, max_examples=60)
@given(samples())
def test_merging_is_exact_for_every_split_and_order(sample):
    log_probs, labels, alpha, generator = sample
    alphas, C = [alpha, .5], log_probs.shape[1]
    whole = CMIAccumulator(alphas, C).update(log_probs, labels)
    order = torch.randperm(len(labels), generator=generator)
    cuts = torch.randint(0, len(labels) + 1, (4,), generator=generator).sort().values
    parts = [CMIAccumulator(alphas, C).update(log_probs[rows], labels[rows]) for rows in order.tensor_split(cuts) if len(rows)]
    total = CMIAccumulator(alphas, C)
    for i in torch.randperm(len(parts), generator=generator).tolist(): total.merge(parts[i])
    assert torch.equal(total.sums, whole.sums) and torch.equal(total.counts, whole.counts)
    assert torch.equal(total.cmi(), whole.cmi()) and torch.equal(total.class_cmi().nan_to_num(-1), whole.class_cmi().nan_to_num(-1))
    exact = class_cmi(log_probs, labels, torch.tensor(alphas, dtype=torch.float64).expand(C, -1))
    np.testing.assert_allclose(total.class_cmi().numpy(), exact.numpy(), rtol=0, atol=2e-14)


@settings(deadline=None, max_examples=60)
@given(samples(sparse=False))
def test_derivative_is_that_of_autograd(sample):
    log_probs, labels, alpha, _ = sample
    alphas = torch.full((log_probs.shape[1],), alpha, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(class_cmi(log_probs, labels, alphas).nansum(), alphas)[0]
    scale = log_probs.abs().max().item()
    np.testing.assert_allclose(cmi_derivative(log_probs, labels, alpha).nan_to_num().numpy(), expected.numpy(), rtol=1e-9, atol=1e-14*max(1, scale)**2)
    assert (cmi_curvature(log_probs, labels).nan_to_num() >= 0).all()


@settings(deadline=None, max_examples=60)
@given(samples(), st.sampled_from([torch.float64, torch.float32]))
def test_gradients_are_finite_with_zeros(sample, dtype):
    log_probs, labels, alpha, _ = sample
    log_probs = log_probs.to(dtype).requires_grad_()
    powers = torch.full((log_probs.shape[1],), alpha, dtype=dtype, requires_grad=True)
    values = class_cmi(log_probs, labels, powers)[labels]
    gradients = torch.autograd.grad(values.sum(), (log_probs, powers))
    assert torch.isfinite(values).all() and all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[0][log_probs == -math.inf] == 0).all()


@settings(deadline=None, max_examples=60)
@given(samples(), st.sampled_from([2**2, 2**5, 2**18]))
def test_a_curve_does_not_depend_on_its_blocks(sample, block):
    from cmim_repro.theory import cmi as module
    log_probs, labels, alpha, _ = sample
    alphas = torch.tensor([0., alpha, .5, 2*alpha, 1e300], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'BLOCK', block)
        curve, total = cmi_curve(log_probs, labels, alphas, True), CMIAccumulator(alphas, log_probs.shape[1]).update(log_probs, labels)
    assert torch.equal(total.sums, CMIAccumulator(alphas, log_probs.shape[1]).update(log_probs, labels).sums)
    seen, several = labels.unique(), alphas[:4].expand(log_probs.shape[1], -1)
    assert curve[seen].isfinite().all() and curve[seen].min() > -1e-14
    np.testing.assert_allclose(curve[:, :4].numpy(), class_cmi(log_probs, labels, several).numpy(), rtol=1e-12, atol=2e-14)


def test_a_curve_of_ten_thousand_answers_stays_in_bounded_blocks():
    from cmim_repro.theory import cmi as module
    generator = torch.Generator().manual_seed(0)
    log_probs, labels = torch.randn(10_000, 100, generator=generator).log_softmax(-1), torch.randint(0, 100, (10_000,), generator=generator)
    alphas = torch.linspace(0, 2, 60, dtype=torch.float64)
    sizes = [probs.numel() for _, _, probs, _ in module._blocks(log_probs, labels, alphas)]
    assert sum(sizes) == 10_000*60*100 and max(sizes) <= module.BLOCK
    curve = cmi_curve(log_probs, labels, alphas, per_class=True)
    some = slice(None, None, 20)
    np.testing.assert_allclose(curve[:, some].numpy(), class_cmi(log_probs.double(), labels, alphas[some].expand(100, -1)).numpy(), rtol=0, atol=1e-13)
