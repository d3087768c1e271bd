"What CMI bounds: mixtures and their inverse, the order of CMI in the share, what loses see, what digits leave; and the release."
import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_releases_properties import answers, is_distribution

from cmim_repro.attacks.amplified import Amplified, ClassMoments, centred_log_probs
from cmim_repro.attacks.core import attack
from cmim_repro.attacks.dist import DIST
from cmim_repro.attacks.standardised import z_scores
from cmim_repro.core import Invalid
from cmim_repro.defenses.core import changes, release
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.paper import label
from cmim_repro.theory.bounds import answer_information, mixed, mixing_coefficient, unmixed
from cmim_repro.theory.cmi import class_centroids, cmi, cmi_curve
from cmim_repro.theory.distributions import power_transform

quick = settings(max_examples=40, deadline=None)


@st.composite
def clusters(draw):
    "Log-probabilities (B, C) without zeros and a class for each."
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, classes, scale = draw(st.integers(2, 30)), draw(st.integers(2, 12)), draw(st.sampled_from([.1, 1., 3.]))
    logits = scale*torch.randn(rows, classes, dtype=torch.float64, generator=random)
    return logits.log_softmax(-1), torch.randint(0, draw(st.integers(1, classes)), (rows,), generator=random)


def own_centroids(log_q, labels): return class_centroids(log_q, labels)[labels]


# ---- by hand

def exact(rows): return torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64).log()


TWO = [[Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)], [Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)]]


def test_a_mixture_by_hand():
    log_q, labels, t = exact(TWO), torch.tensor([0, 0]), Fraction(1, 3)
    s = [sum(column)/2 for column in zip(*TWO, strict=True)]
    expected = exact([[t*q + (1 - t)*m for q, m in zip(row, s, strict=True)] for row in TWO])
    torch.testing.assert_close(mixed(log_q, own_centroids(log_q, labels), 1/3), expected)


def test_the_coefficient_is_half_the_mean_chi_square_by_hand():
    "s = (3/8, 1/4, 3/8), so chi-square is (1/64)/(3/8)*2 = 1/12 for both."
    assert mixing_coefficient(exact(TWO), torch.tensor([0, 0])).item() == pytest.approx(1/24)
    weights, r = [9/64, 1/16, 9/64], [1/3, 0, -1/3] # at power 2, before they are divided by their sum 11/32
    variance = sum(w/(11/32)*v*v for w, v in zip(weights, r, strict=True))
    assert mixing_coefficient(exact(TWO), torch.tensor([0, 0]), 2.).item() == pytest.approx(4/2*variance)


@pytest.mark.parametrize('alpha', [.25, 1., 3.])
def test_the_order_in_forty_digits(alpha):
    "CMI of mixed answers over t squared, at a share where float64 has few digits left."
    random = torch.Generator().manual_seed(3)
    log_q, labels, t = torch.randn(6, 5, dtype=torch.float64, generator=random).log_softmax(1), torch.zeros(6, dtype=torch.int64), '1e-9'
    with mpmath.workdps(60):
        q = [[mpmath.exp(v) for v in row] for row in log_q.tolist()]
        s = [sum(column)/len(q) for column in zip(*q, strict=True)]
        rows = []
        for row in q:
            powered = [(mpmath.mpf(t)*v + (1 - mpmath.mpf(t))*m)**alpha for v, m in zip(row, s, strict=True)]
            rows.append([v/sum(powered) for v in powered])
        centre = [sum(column)/len(rows) for column in zip(*rows, strict=True)]
        value = sum(v*mpmath.log(v/m) for row in rows for v, m in zip(row, centre, strict=True))/len(rows)
        expected = float(value/mpmath.mpf(t)**2)
    assert mixing_coefficient(log_q, labels, alpha).item() == pytest.approx(expected, rel=1e-7)


def test_information_by_hand():
    "Classes of four and two images; rounded to one digit the first has answers 2 + 1 + 1, the second 2."
    rows = [[.61, .39], [.62, .38], [.7, .3], [.2, .8], [.5, .5], [.5, .5]]
    log_q, labels = torch.tensor(rows, dtype=torch.float64).log(), torch.tensor([0, 0, 0, 0, 1, 1])
    assert answer_information(log_q, labels, 1).item() == pytest.approx(4/6*1.5*math.log(2))
    assert answer_information(log_q, labels).item() == pytest.approx(4/6*math.log(4))
    assert answer_information(log_q, torch.arange(6)).item() == pytest.approx(0, abs=1e-12)


# ---- properties

@quick
@given(clusters(), st.sampled_from([1., .3, .01, 1e-4]))
def test_mixing_is_undone_by_what_the_thief_sees(sample, t):
    log_q, labels = sample
    hidden = mixed(log_q, own_centroids(log_q, labels), t)
    is_distribution(hidden, 1e-12)
    back = unmixed(hidden, own_centroids(hidden, labels), t)
    torch.testing.assert_close(back.exp(), log_q.exp(), rtol=0, atol=1e-14/t)


@quick
@given(clusters(), st.floats(1e-3, 1))
def test_cmi_is_below_its_bounds(sample, t):
    log_q, labels = sample
    hidden = mixed(log_q, own_centroids(log_q, labels), t)
    value, chi_square = cmi(hidden, labels).item(), 2*mixing_coefficient(log_q, labels).item()
    assert value <= t**2*chi_square + 1e-13 and chi_square <= log_q.shape[1] - 1 + 1e-9
    assert value <= t*cmi(log_q, labels).item() + 1e-13 # KL is convex
    distance = (hidden.exp() - own_centroids(hidden, labels).exp()).abs().sum(1).mean().item()
    assert distance <= math.sqrt(2*max(value, 0)) + 1e-7


@quick
@given(clusters(), st.sampled_from([.25, 1., 4.]))
def test_cmi_is_of_the_second_order(sample, alpha):
    log_q, labels = sample
    c, t = mixing_coefficient(log_q, labels, alpha).item(), 1e-4
    hidden = mixed(log_q, own_centroids(log_q, labels), t)
    assert cmi(hidden, labels, alpha).item() == pytest.approx(c*t**2, rel=.05, abs=1e-13)


@quick
@given(clusters(), st.integers(1, 9))
def test_digits_take_information_and_maps_do_not(sample, digits):
    log_q, labels = sample
    whole = answer_information(log_q, labels).item()
    assert -1e-12 <= answer_information(log_q, labels, digits).item() <= whole + 1e-12
    assert answer_information(power_transform(log_q, .5), labels).item() == pytest.approx(whole, abs=1e-12)
    assert answer_information(mixed(log_q, own_centroids(log_q, labels), .1), labels).item() == pytest.approx(whole, abs=1e-12)


@quick
@given(clusters(), st.integers(1, 3))
def test_residuals_below_half_a_digit_are_gone_from_a_rounded_centroid(sample, digits):
    log_q, labels = sample
    centroid = own_centroids(log_q, labels).exp()
    grid, residual = centroid.round(decimals=digits), log_q.exp() - centroid
    assert torch.equal((grid + .49*10.**-digits*residual).round(decimals=digits), grid)


@quick
@given(clusters(), st.floats(.05, 1))
def test_what_the_losses_do_not_see(sample, a):
    log_q, labels = sample
    classes = log_q.shape[1]
    z = torch.randn(log_q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = mixed(log_q, torch.full_like(log_q, -math.log(classes)), a)
    sides = [[rows - rows.mean(1, keepdim=True) for rows in pair] for pair in ((z.softmax(1), flat.exp()), (z.softmax(1).T, flat.exp().T))]
    room = [(1e-8/(left.norm(dim=1)*right.norm(dim=1))).max() + 1e-9 for left, right in sides] # 1e-8 is added to the product of the norms
    for one, other, most in zip(*(DIST(temperature=1.).relations(z, p) for p in (log_q, flat)), room, strict=True):
        assert abs(one - other) <= most
    smallest = a*log_q.std(1, correction=0).min().item() # 1e-7 is added to it
    torch.testing.assert_close(z_scores(power_transform(log_q, a)), z_scores(log_q), rtol=0, atol=1e-7*classes/smallest + 1e-9)
    moments = ClassMoments(classes)
    moments.update(centred_log_probs(log_q), labels)
    shift = torch.randn(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if (moments.spread()[labels] < 1e-2).any(): return # 1e-6 is added to the spread
    seen = []
    for p in (log_q, (a*log_q + shift[labels]).log_softmax(1)):
        thief = Amplified(num_classes=classes)
        thief.moments.update(centred_log_probs(p), labels)
        seen.append(thief.target(p, labels).exp())
    torch.testing.assert_close(*seen, rtol=0, atol=.02)


# ---- the thief who undoes it

@quick
@given(clusters(), st.sampled_from([1., .1, .01]))
def test_the_thief_finds_the_networks_answers_after_one_epoch(sample, t):
    "And then does what KD does with them; before, what KD does with the answers as they stand."
    log_q, labels = sample
    predicted, classes = log_q.argmax(1), log_q.shape[1]
    hidden = mixed(log_q, own_centroids(log_q, predicted), t)
    z = torch.randn(log_q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    thief, labels, kd = attack('unmixed', share=t, num_classes=classes), labels % classes, attack('kd')
    for part in torch.arange(len(z)).split(5):
        heard = thief(z[part], hidden[part], labels[part], epoch=0)
        torch.testing.assert_close(heard, kd(z[part], hidden[part], labels[part]))
    torch.testing.assert_close(thief.undone(hidden).exp(), log_q.exp(), rtol=0, atol=1e-11)
    torch.testing.assert_close(thief(z, hidden, labels, epoch=1), kd(z, log_q, labels), rtol=1e-4, atol=1e-6)


def test_the_thief_by_hand():
    "Three answers with the mean (.5, .3, .2); their residuals times four, and the divergence from uniform logits."
    heard = torch.tensor([[.6, .25, .15], [.5, .32, .18], [.4, .33, .27]], dtype=torch.float64)
    thief = attack('unmixed', share=.25, weight=1., temperature=1., num_classes=3)
    z, labels = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    thief(z, heard.log(), labels, epoch=0)
    undone = [[.9, .1, 0], [.5, .38, .12], [.1, .42, .48]]
    torch.testing.assert_close(thief.undone(heard.log()).exp(), torch.tensor(undone, dtype=torch.float64))
    expected = sum(math.log(3) + sum(p*math.log(p) for p in row if p) for row in undone)/3
    assert thief(z, heard.log(), labels, epoch=1).item() == pytest.approx(expected)


# ---- the release

@pytest.fixture(scope='module')
def known(): return (3*torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).log_softmax(-1)


def made(known, **options):
    module = release('mixed', num_classes=known.shape[1], **options)
    module.fit(known)
    return module


def test_the_release_mixes_with_the_centroid_of_the_predicted_class(known):
    asked = known.flip(1)
    s = class_centroids(known, known.argmax(-1))[asked.argmax(-1)].exp()
    for t in (0, .2, 1): torch.testing.assert_close(made(known, t=t)(asked).exp(), t*asked.exp() + (1 - t)*s)
    torch.testing.assert_close(made(known, t=.2, digits=2)(asked), release('rounding')(made(known, t=.2)(asked)))
    centroid = release('centroid', num_classes=6)
    centroid.fit(known)
    torch.testing.assert_close(made(known, t=0)(asked), centroid(asked))


@quick
@given(answers(), st.floats(0, 1), st.sampled_from([0, 1, 3]))
def test_the_release_is_a_distribution_and_keeps_the_label(asked, t, digits):
    module = made(asked, t=t, digits=digits)
    for log_probs, tolerance in ((asked, 1e-12), (asked.float(), 1e-5)):
        answered = module(log_probs)
        assert answered.dtype == log_probs.dtype
        is_distribution(answered, tolerance)
        top = log_probs.argmax(-1, keepdim=True)
        assert (answered.gather(-1, top) >= answered.max(-1, keepdim=True).values - 1e-6).all()


def test_cmi_falls_and_the_label_stays(known):
    predicted, powers = known.argmax(-1), torch.linspace(0, 4, 21, dtype=torch.float64)
    values = [cmi_curve(made(known, t=t)(known), predicted, powers).max().item() for t in (1, .1, .01, .001)]
    assert all(after < before/5 for before, after in zip(values, values[1:], strict=False)) and values[-1] < 1e-4
    assert changes(made(known, t=.001)(known), known)['top-1 changed'] == 0


@pytest.mark.parametrize('options, message', [
    ({'t': -.1}, 't is -0.1; it must be a number from 0 up to 1'), ({'t': 1.5}, 't is 1.5; it must be a number from 0 up to 1'),
    ({'digits': 10}, 'digits is 10; it must be a whole number from 0 up to 9'),
    ({'share': .1}, "Unknown option of release 'mixed' 'share'; accepted: t, digits")])
def test_bad_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(Invalid) as refusal: release('mixed', **options, **({'num_classes': 3} if 'share' not in options else {}))
    assert str(refusal.value).startswith(message) and '\n' not in str(refusal.value)


def test_bad_shapes_and_labels_are_refused(known):
    with pytest.raises(Invalid, match='log-probabilities have shape'): mixed(known[0], known[0], .5)
    with pytest.raises(Invalid, match='t is 0; it must be a number above 0'): unmixed(known, known, 0)
    with pytest.raises(Invalid, match='digits is 1.5; it must be a whole number'): answer_information(known, known.argmax(1), 1.5)


def test_as_a_run(tmp_path):
    common = {'recipe': Recipe(epochs=1, batch_size=32), 'data_options': {'per_class': 20, 'test_per_class': 10, 'held_out': .2}}
    teacher, store = make_run('digits', 'cnn_tiny', 'ce', **common), Store(tmp_path)
    runs = [make_run('digits', 'cnn_tiny', name, teacher=teacher, data_options=common['data_options'], **options)
            for name, options in (('centroid', {}), ('mixed', {'t': 0}), ('mixed', {'t': 1}))]
    student = make_run('digits', 'cnn_tiny', 'kd', teacher=runs[1], **common)
    assert execute(Plan.of([*runs, student]).check(), store, Settings(device='cpu')) == [] and store.finished(student)
    centroid, none, all_ = (store.log_probs(run)[0] for run in runs)
    torch.testing.assert_close(none, centroid)
    torch.testing.assert_close(all_, store.log_probs(teacher)[0])
    assert label('mixed') == 'Mixed'
