"""What must hold for every release, whatever the network says."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.core import Invalid
from cmim_repro.defenses.core import defense, defense_names, release
from cmim_repro.defenses.mad import angular_deviation, greedy_argmax_corner, poison, project

quick = settings(max_examples=40, deadline=None)
CHOICES = [('identity', {}), ('st', {}), ('st', {'ratio': .4}), ('rsp', {}), ('rsp', {'variant': 'authors'}), ('rsp', {'variant': 'paper'}),
           ('rsp', {'magnitude': 7.}), ('mad', {}), ('mad', {'oracle': 'extreme'}), ('mad', {'norm': 'l2', 'objmax': False}),
           ('mad', {'optimiser': 'project', 'budget': .3}), ('apgp', {}), ('apgp', {'variant': 'paper'}),
           ('top1', {}), ('top1', {'epsilon': .3}), ('rounding', {}), ('rounding', {'digits': 1}), ('centroid', {}), ('shuffled', {}), ('uniform', {}),
           ('mixed', {}), ('mixed', {'digits': 1})]


def made(name, options, classes):
    facts = {'mad': {'num_classes': classes, 'image_shape': (1, 8, 8), 'surrogate': 'cnn_tiny'}, 'apgp': {'num_classes': classes, 'hidden': 8},
             'centroid': {'num_classes': classes}, 'mixed': {'num_classes': classes}, 'shuffled': {'num_classes': classes, 'image_shape': (1, 8, 8)}}
    return release(name, **options, **facts.get(name, {}))


def pictures(log_probs): return torch.rand(len(log_probs), 1, 8, 8, generator=torch.Generator().manual_seed(len(log_probs)))


@st.composite
def answers(draw, dtype=torch.float64, classes=st.integers(2, 50)):
    "Log-probabilities of B from 1, C from 2, mild or extreme, sometimes with exact zeros or ties"
    rows, columns, scale = draw(st.integers(1, 5)), draw(classes), draw(st.sampled_from([0., .1, 3., 50.]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = scale * (2 * torch.rand(rows, columns, dtype=dtype, generator=random) - 1)
    if draw(st.booleans()): logits[:, 1:][torch.rand(rows, columns - 1, generator=random) < .3] = -math.inf
    return logits.log_softmax(-1)


def is_distribution(log_probs, tolerance):
    probs = log_probs.exp()
    assert not probs.isnan().any() and (probs >= 0).all()
    assert (probs.sum(-1) - 1).abs().max() <= tolerance


@pytest.mark.parametrize('name, options', CHOICES)
@quick
@given(answers())
def test_a_release_is_a_distribution(name, options, log_probs):
    with torch.no_grad(): answered = made(name, options, log_probs.shape[1])(log_probs, pictures(log_probs))
    assert answered.shape == log_probs.shape and answered.dtype == log_probs.dtype
    is_distribution(answered, 1e-12)


@pytest.mark.parametrize('name, options', CHOICES)
@quick
@given(answers(torch.float32))
def test_a_release_is_a_distribution_in_single_precision(name, options, log_probs):
    with torch.no_grad(): answered = made(name, options, log_probs.shape[1])(log_probs, pictures(log_probs))
    assert answered.dtype == torch.float32
    is_distribution(answered, 1e-5)


@pytest.mark.parametrize('name, options', [c for c in CHOICES if c[0] not in ('mad', 'shuffled') and c != ('rsp', {'variant': 'authors'})])
@quick
@given(answers())
def test_an_answer_does_not_depend_on_the_batch(name, options, log_probs):
    module = made(name, options, log_probs.shape[1])
    with torch.no_grad(): assert torch.allclose(module(log_probs).exp()[:1], module(log_probs[:1]).exp(), atol=1e-6)


@quick
@given(answers(), st.sampled_from(['argmax', 'extreme']), st.sampled_from(['walk', 'project']))
def test_mad_answers_one_by_one_as_in_a_batch(log_probs, oracle, optimiser):
    y = log_probs.exp()
    s = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).softmax(-1)
    together, alone = poison(y, s, .5, oracle, optimiser=optimiser)[:1], poison(y[:1], s[:1], .5, oracle, optimiser=optimiser)
    # which of two equally good corners was taken may differ; how good they are may not
    assert torch.allclose(angular_deviation(together, y[:1], s[:1]), angular_deviation(alone, y[:1], s[:1]), atol=1e-6)


@pytest.mark.parametrize('name, options', [('st', {}), ('st', {'ratio': .4}), ('rsp', {}), ('rsp', {'variant': 'authors'}), ('rsp', {'variant': 'paper'})])
@quick
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_names_of_classes_do_not_matter(name, options, classes, rows, seed):
    random = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(rows, classes, dtype=torch.float64, generator=random).log_softmax(-1)
    order = torch.randperm(classes, generator=random)
    module = release(name, **options)
    torch.testing.assert_close(module(log_probs[:, order]).exp(), module(log_probs).exp()[:, order])


@pytest.mark.parametrize('oracle', ['argmax', 'extreme'])
@quick
@given(st.integers(2, 50), st.integers(1, 4), st.integers(0, 2**31))
def test_names_of_classes_do_not_matter_to_mad(oracle, classes, rows, seed):
    "Victim and surrogate are renamed together. Two corners may be equally good, so the angle and the budget are compared where the corners differ."
    random = torch.Generator().manual_seed(seed)
    y, s = torch.randn(2, rows, classes, dtype=torch.float64, generator=random).mul(torch.tensor([[[4.]], [[.5]]])).softmax(-1)
    order = torch.randperm(classes, generator=random)
    plain, renamed = poison(y, s, oracle=oracle), poison(y[:, order], s[:, order], oracle=oracle)
    torch.testing.assert_close(angular_deviation(renamed, y[:, order], s[:, order]), angular_deviation(plain, y, s), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((renamed - y[:, order]).abs().sum(-1), (plain - y).abs().sum(-1), rtol=1e-6, atol=1e-6)
    if classes > 2: torch.testing.assert_close(renamed, plain[:, order], rtol=1e-6, atol=1e-6)


@quick
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_names_of_classes_do_not_matter_to_apgp(classes, rows, seed):
    "Where the generator's inputs and outputs are renamed with the classes."
    random = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(rows, classes, dtype=torch.float64, generator=random).log_softmax(-1)
    order = torch.randperm(classes, generator=random)
    plain, renamed = (made('apgp', {}, classes).double() for _ in range(2))
    first, last = renamed.generator.perceptron[0], renamed.generator.perceptron[-1]
    with torch.no_grad():
        first.weight.copy_(first.weight[:, order])
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
        torch.testing.assert_close(renamed(log_probs[:, order]), plain(log_probs)[:, order])


KEEP_TOP = [('identity', {}), ('st', {}), ('st', {'ratio': .4}), ('mad', {}), ('mad', {'budget': 2.}), ('mad', {'norm': 'l2', 'objmax': False}),
            ('top1', {}), ('top1', {'epsilon': .3}), ('rounding', {}), ('rounding', {'digits': 1}), ('centroid', {}), ('shuffled', {}), ('mixed', {}), ('mixed', {'digits': 1})]


@pytest.mark.parametrize('name, options', KEEP_TOP)
@quick
@given(answers())
def test_the_top_class_stays(name, options, log_probs):
    answered = made(name, options, log_probs.shape[1])(log_probs, pictures(log_probs))
    top = log_probs.argmax(-1, keepdim=True)
    assert (answered.gather(-1, top) >= answered.max(-1, keepdim=True).values - 1e-12).all()


@quick
@given(answers(), st.floats(.01, 2), st.sampled_from(['argmax', 'extreme']), st.sampled_from(['l1', 'l2']), st.booleans(), st.sampled_from(['walk', 'project']))
def test_mad_keeps_to_its_budget(log_probs, budget, oracle, norm, objmax, optimiser):
    """Exactly by walking; by alternating projections within 1e-4, if a hundred of them are enough.

    The victim's y is in the ball and in the simplex, so a projection of x on the ball, d away, leaves at most
    |x - y|^2 - d^2 to y, and d never grows. From |x - y|^2 <= 2 follows d <= (2/100)^.5 after a hundred, in the norm l1
    at most C^.5 times that. Where a hundred are not enough, more of them are."""
    y = log_probs.exp()
    s = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).softmax(-1)
    beyond = lambda point: (point - y).norm(p={'l1': 1, 'l2': 2}[norm], dim=-1) - budget
    answered = poison(y, s, budget, oracle, norm, objmax, optimiser)
    excess = beyond(answered)
    if optimiser == 'walk':
        assert (excess <= 1e-9).all()
        return
    assert (excess <= (2/100)**.5 * (y.shape[1]**.5 if norm == 'l1' else 1) + 1e-9).all()
    for _ in range(9):
        if (beyond(answered) > 1.01e-4).any(): answered = project(y, answered, budget, norm)
    assert (beyond(answered) <= 1.01e-4).all()


@quick
@given(st.integers(11, 60), st.integers(0, 2**31))
def test_greedy_search_equals_a_plain_one(classes, seed):
    y, s = (torch.randn(2, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * torch.tensor([[4.], [.5]])).softmax(-1)
    raised = (y + 1e-8) / (y + 1e-8).sum()
    top, chosen, best, compared = int(y.argmax()), {int(y.argmax())}, -1., 0
    while compared < 1024 and len(chosen) < classes:
        candidates = torch.zeros(classes, classes, dtype=y.dtype)
        candidates[:, list(chosen)] = 1
        candidates.fill_diagonal_(1)
        candidates[:, top] += 1e-5
        candidates /= candidates.sum(-1, keepdim=True)
        values = angular_deviation(candidates, raised, s)
        values[list(chosen)] = -1
        compared += classes - len(chosen)
        chosen.add(int(values.argmax()))
        best = max(best, values.max().item())
    found = angular_deviation(greedy_argmax_corner(y[None], s[None])[0], raised, s).item()
    assert abs(found - best) < 1e-6


@quick
@given(answers(), st.floats(.01, 1))
def test_stingy_keeps_the_largest(log_probs, ratio):
    answered = release('st', ratio=ratio)(log_probs)
    kept = max(1, int(ratio * log_probs.shape[1]))
    smallest_kept = log_probs.sort(dim=-1, descending=True).values[:, kept - 1:kept]
    assert ((answered > -math.inf).sum(-1) <= kept).all()
    assert (answered[log_probs < smallest_kept] == -math.inf).all()


@pytest.mark.parametrize('batch', [torch.zeros(0, 3), torch.zeros(3, 1), torch.zeros(3)])
@pytest.mark.parametrize('name', ['identity', 'st', 'rsp', 'mad', 'apgp', 'top1', 'rounding', 'centroid', 'shuffled', 'uniform', 'mixed'])
def test_bad_shapes_are_refused(name, batch):
    with pytest.raises(Invalid, match='log-probabilities have shape'): made(name, {}, 3)(batch, torch.zeros(3, 1, 8, 8))


def test_every_defence_has_a_name_and_both_halves():
    releases = {'st', 'rsp', 'mad', 'apgp', 'top1', 'rounding', 'centroid', 'shuffled', 'uniform', 'mixed'}
    assert {'ce', 'ls', 'nt', 'snt', 'cmim', *releases} <= set(defense_names())
    facts = {'num_classes': 4, 'image_shape': (3, 32, 32), 'seed': 0}
    for name in ('ce', 'ls', 'nt', 'snt', *releases):
        one = defense(name)
        assert one.releases == (name in releases) and one == defense(name, **one.options)
        one.make_objective(**facts), one.make_release(**facts)
    with pytest.raises(Invalid, match="Unknown defence 'none'; accepted: apgp, ce"): defense('none')
