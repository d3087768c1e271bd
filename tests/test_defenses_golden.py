"""Training objectives and releases against numbers made by the methods' own code (golden/README.md says which)."""
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmim_repro.defenses import mad
from cmim_repro.defenses.core import objective, release
from cmim_repro.theory.distributions import kl, power_transform

GOLDEN = Path(__file__).parent / 'golden'


@cache
def arrays(name):
    "case -> array name -> float64 or int64 tensor"
    cases = {}
    with np.load(GOLDEN / f'{name}.npz', allow_pickle=False) as file:
        for key in file.files:
            case, what = key.split('__', 1)
            cases.setdefault(case, {})[what] = torch.from_numpy(np.asarray(file[key]))
    return cases


def matching(name, pattern):
    "(case, arrays, match) for every array whose whole name matches"
    found = [(case, a, m) for case, a in arrays(name).items() for what in a if (m := re.fullmatch(pattern, what))]
    assert found, pattern
    return found


def agree(actual, expected, rtol=1e-8, atol=1e-12):
    torch.testing.assert_close(actual.detach().double(), expected.double(), rtol=rtol, atol=atol)


def value_and_gradient(module, a, dtype=torch.float64):
    logits = a['student_logits'].to(dtype).requires_grad_()
    loss = module(logits, a['teacher_logits'].to(dtype).log_softmax(-1), a['labels'])
    return loss, torch.autograd.grad(loss, logits)[0]


def compare(module, a, value, gradient):
    loss, grad = value_and_gradient(module, a)
    agree(loss, value), agree(grad, gradient)


def compare_single(module, case, a, value, gradient):
    if case.endswith('ext'): return
    loss, grad = value_and_gradient(module, a, torch.float32)
    agree(loss, value, 1e-4, 1e-5), agree(grad, gradient, 1e-4, 1e-5)


def number(text): return float(text.replace('p', '.'))


def test_label_smoothing():
    for case, a, m in matching('ls', r'eps([\d.]+)'):
        module = objective('ls', epsilon=number(m[1]))
        compare(module, a, a[m[0]], a[f'{m[0]}_grad']), compare_single(module, case, a, a[m[0]], a[f'{m[0]}_grad'])


def test_nasty_teacher_published():
    for case, a, m in matching('nt', r'vita_w([\d.]+)_T(\d+)_loss_ce_adv'):
        module, (total, ce, divergence) = objective('nt', weight=number(m[1]), temperature=number(m[2])), a[m[0]]
        gradient = a[m[0].replace('loss_ce_adv', 'grad_nasty_logits')]
        compare(module, a, total - 100, gradient), compare_single(module, case, a, total - 100, gradient)
        agree(module.divergence(a['student_logits'], a['teacher_logits'].log_softmax(-1)), divergence)
        agree(F.cross_entropy(a['student_logits'], a['labels']), ce)


def test_nasty_teacher_authors():
    for case, a, m in matching('nt', r'cmimrepo_w([\d.]+)_T(\d+)'):
        module = objective('nt', 'authors', weight=number(m[1]), temperature=number(m[2]))
        compare(module, a, a[m[0]], a[f'{m[0]}_grad']), compare_single(module, case, a, a[m[0]], a[f'{m[0]}_grad'])


@pytest.mark.parametrize('variant', ['recommended', 'authors'])
def test_generator_loss(variant):
    for case, a, m in matching('apgp', r'loss_lambda([\dp]+)'):
        module, gradient = objective('apgp', variant, weight=number(m[1])), a[f'{m[0]}_grad_perturbed_logits']
        compare(module, a, a[m[0]], gradient), compare_single(module, case, a, a[m[0]], gradient)


def test_cross_entropy():
    for case, a, _ in matching('cmi', 'ce'):
        logits = a['teacher_logits']
        agree(objective('ce')(logits, None, a['labels']), a['ce'])
        if not case.endswith('ext'): agree(objective('ce')(logits.float(), None, a['labels']), a['ce'], 1e-4, 1e-6)


def sparse(a, ratio, variant='recommended', dtype=torch.float64): return release('st', variant, ratio=ratio)(a['teacher_logits'].to(dtype).log_softmax(-1))


def test_stingy_probabilities():
    for case, a, m in matching('st', r'ratio([\d.]+)_numkeep'):
        ratio, classes = number(m[1]), a['teacher_logits'].shape[1]
        assert release('st', ratio=ratio).kept(classes) == a[m[0]]
        agree(sparse(a, ratio).exp(), a[f'ratio{m[1]}_sparse_probs'])
        if not case.endswith('ext'): agree(sparse(a, ratio, dtype=torch.float32).exp(), a[f'ratio{m[1]}_sparse_probs'], 1e-4, 1e-6)


def soft_loss(a, answered, temperature, elements=1):
    logits = a['student_logits'].clone().requires_grad_()
    soft = kl(power_transform(answered, 1 / temperature), power_transform(logits, 1 / temperature)).mean() / elements
    loss = .9 * temperature**2 * soft + .1 * F.cross_entropy(logits, a['labels'])
    return loss, torch.autograd.grad(loss, logits)[0]


def test_distillation_from_stingy():
    for _, a, m in matching('st', r'ratio([\d.]+)_a0\.9_T(\d+)'):
        loss, grad = soft_loss(a, sparse(a, number(m[1])), number(m[2]))
        agree(loss, a[m[0]]), agree(grad, a[f'{m[0]}_grad'])


def test_distillation_from_stingy_authors():
    for _, a, m in matching('st', r'cmimrepo_ratio([\d.]+)_T(\d+)'):
        loss, grad = soft_loss(a, sparse(a, number(m[1]), 'authors'), number(m[2]), a['teacher_logits'].shape[1])
        agree(loss, a[m[0]]), agree(grad, a[f'{m[0]}_grad'])


def answered(a, dtype=torch.float64, **options): return release('rsp', **options)(a['teacher_logits'].to(dtype).log_softmax(-1)).exp()


def test_reverse_sigmoid_published():
    for case, a, m in matching('rsp', r'predpoison_beta([\d.]+)_gamma([\d.]+)'):
        options = {'magnitude': number(m[1]), 'steepness': number(m[2])}
        agree(answered(a, **options), a[m[0]])
        if not case.endswith('ext'): agree(answered(a, torch.float32, **options), a[m[0]], 1e-4, 1e-6)


def test_reverse_sigmoid_authors():
    for case, a, m in matching('rsp', r'cmimrepo_alpha([\d.]+)_beta([\d.]+)'):
        options = {'variant': 'authors', 'magnitude': number(m[1]), 'steepness': number(m[2])}
        ours, single = answered(a, **options), answered(a, torch.float32, **options)
        if len(ours) > 1:
            agree(ours, a[m[0]])
            # what is left of a row after the minima are subtracted may be small, and single precision enters before that
            if not case.endswith('ext'): agree(single, a[m[0]], 1e-4, 1e-5)
        else: assert a[m[0]].isnan().any() and ours.isfinite().all() # the reference divides zero by zero


def corner(a, oracle, kind):
    y, s = a['victim_probs'], a['surrogate_probs']
    if oracle == 'extreme': return mad.extreme_corner(y, s, kind == 'obj')
    return mad.exact_argmax_corner(y, s, kind == 'obj') if y.shape[1] <= 10 else mad.greedy_argmax_corner(y, s)


def gradient_norm(a, vectors):
    "Length of G'(vectors) with the surrogate's features, (B,)"
    return vectors.norm(dim=-1) * a['surrogate_features'].norm(dim=-1)


def test_jacobian():
    for a in arrays('mad').values():
        s, f = a['surrogate_probs'][0], a['surrogate_features'][0]
        closed = (s - torch.eye(len(s))).unsqueeze(-1) * f
        agree(closed.flatten(1), a['jacobian0'], 1e-6, 1e-9)


def test_values_of_the_reference_corners():
    "H, or the squared distance of the gradients where the reference's oracle does not maximise H; its vertices for up to ten classes are in single precision."
    for _, a, m in matching('mad', r'(extreme|argmax)_(surr|obj)_value'):
        y, s, corners = a['victim_probs'], a['surrogate_probs'], a[f'{m[1]}_{m[2]}_ystar']
        maximises = m[2] == 'obj' or (m[1] == 'argmax' and y.shape[1] > 10)
        agree(mad.angular_deviation(corners, y, s) if maximises else gradient_norm(a, corners - y)**2, a[m[0]], 1e-6, 1e-6)


def test_corners_are_as_good():
    for _, a, m in matching('mad', r'(extreme|argmax)_(surr|obj)_ystar'):
        y, s = a['victim_probs'], a['surrogate_probs']
        ours, theirs = corner(a, m[1], m[2]), a[m[0]]
        if m[2] == 'obj' or (m[1] == 'argmax' and y.shape[1] > 10):
            agree(mad.angular_deviation(ours, y, s), mad.angular_deviation(theirs, y, s), 1e-6, 1e-6)
        else: agree(gradient_norm(a, ours - y), gradient_norm(a, theirs - y), 1e-6, 1e-6)
        if m[1] == 'argmax': assert torch.equal(ours.argmax(-1), y.argmax(-1))


def same_corner(a, m):
    "Rows where ours is the reference's corner; elsewhere it ties with it (see the test above)"
    return (corner(a, m[1], m[2]) - a[f'{m[1]}_{m[2]}_ystar']).abs().amax(-1) < 1e-6


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_answers_within_the_budget(dtype):
    "In single precision as a release does it: the victim's log-probabilities and the surrogate's logits are single, the search is double."
    checked, tolerance = 0, (1e-6, 1e-6) if dtype == torch.float64 else (1e-4, 1e-5)
    for case, a, m in matching('mad', r'(extreme|argmax)_(surr|obj)_(proj)?(l[12])eps([\d.]+)_ytilde'):
        if dtype == torch.float32 and case.endswith('ext'): continue
        y, s = (a[f'{who}_probs'].log().to(dtype).double().softmax(-1) for who in ('victim', 'surrogate'))
        theirs, rows = a[m[0]], same_corner(a, m)
        rows &= (corner({**a, 'victim_probs': y, 'surrogate_probs': s}, m[1], m[2]) - corner(a, m[1], m[2])).abs().amax(-1) < 1e-6
        options = {'budget': number(m[5]), 'norm': m[4], 'oracle': m[1], 'objmax': m[2] == 'obj', 'optimiser': 'project' if m[3] else 'walk'}
        agree(mad.poison(y, s, **options)[rows], theirs[rows], *tolerance)
        reached = (mad.project if m[3] else mad.walk)(y, a[f'{m[1]}_{m[2]}_ystar'], options['budget'], m[4])
        agree(reached, theirs, *tolerance)
        checked += int(rows.sum())
    assert checked > (500 if dtype == torch.float64 else 400)


def test_objectives_reached():
    for _, a, m in matching('mad', r'(extreme|argmax)_(surr|obj)_l1eps([\d.]+)_objective'):
        y, s, rows = a['victim_probs'], a['surrogate_probs'], same_corner(a, m)
        ours = mad.poison(y, s, budget=number(m[3]), oracle=m[1], objmax=m[2] == 'obj')
        agree(mad.angular_deviation(ours, y, s)[rows], a[m[0]][rows], 1e-6, 1e-6)


INPUTS = r'(student|teacher)_logits|labels'
TESTED = {'ls': INPUTS + r'|eps[\d.]+(_grad)?', 'nt': INPUTS + r'|vita_w[\d.]+_T\d+_(loss_ce_adv|grad_nasty_logits)|cmimrepo_w[\d.]+_T\d+(_grad)?',
          'apgp': INPUTS + r'|loss_lambda[\dp]+(_grad_perturbed_logits)?', 'rsp': INPUTS + r'|predpoison_beta[\d.]+_gamma[\d.]+|cmimrepo_alpha[\d.]+_beta[\d.]+',
          'st': INPUTS + r'|ratio[\d.]+_(numkeep|sparse_probs)|ratio[\d.]+_a0\.9_T\d+(_grad)?|cmimrepo_ratio[\d.]+_T\d+(_grad)?',
          'mad': r'(victim|surrogate)_probs|surrogate_features|jacobian0|(extreme|argmax)_(surr|obj)_(ystar|value|l1eps[\d.]+_objective|(proj)?l[12]eps[\d.]+_ytilde)'}


@pytest.mark.parametrize('name', TESTED)
def test_every_array_of_the_files_is_used(name):
    assert [(case, what) for case, a in arrays(name).items() for what in a if not re.fullmatch(TESTED[name], what)] == []
