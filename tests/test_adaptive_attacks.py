"""Attackers who adapt, against formulas written out number by number, and what they must and must not see."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.attacks.amplified import ClassMoments, centred_log_probs
from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid
from cmim_repro.defenses.ls import EPSILONS
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.training import Learner, Recipe, Settings, train
from cmim_repro.report.paper import ATTACKS
from cmim_repro.theory.cmi import cmi
from cmim_repro.theory.distributions import power_transform

NAMES = ['amplified', 'anchored', 'standardised', 'ttm', 'wttm']
CASES = [(5, 3, 1.), (8, 10, 3.), (6, 2, 20.), (12, 4, .1)]


def made(name, C, variant='recommended', **options):
    return attack(name, variant, **options, **({'num_classes': C} if 'num_classes' in attack.context(name) else {}))


def case(B, C, scale, seed=0, zeros=False):
    generator = torch.Generator().manual_seed(1000*B + 10*C + seed)
    student, teacher = scale*torch.randn(2, B, C, generator=generator, dtype=torch.float64)
    if zeros: teacher = teacher.masked_fill(teacher < teacher.median(1, keepdim=True).values, -torch.inf)
    return student, teacher.log_softmax(1), torch.randint(C, (B,), generator=generator)


# The formulas again, in plain numbers: probabilities instead of logarithms, loops instead of tensors.

def softened(row, power):
    raised = [p**power if p > 0 else 0. for p in row]
    return [p/sum(raised) for p in raised]


def soft(scores):
    top = max(scores)
    return softened([math.exp(s - top) for s in scores], 1)


def cross(target, model): return -sum(t*math.log(m) for t, m in zip(target, model, strict=True) if t > 0)
def divergence(target, model): return cross(target, model) - cross(target, target)


def anchored(logits, answers, labels, weight, temperature):
    total = 0.
    for z, p, y in zip(logits, answers, labels, strict=True):
        q, raised = soft(z), softened(p, 1/temperature)
        total += (1 - weight)*-math.log(q[y]) + weight*cross(raised, q)
    return total/len(logits)


def ttm(logits, answers, labels, weight, power, weighted=False):
    total = 0.
    for z, p, y in zip(logits, answers, labels, strict=True):
        q, factor = soft(z), sum(x**power for x in p if x > 0) if weighted else 1.
        total += -math.log(q[y]) + weight*factor*divergence(softened(p, power), q)
    return total/len(logits)


def z_row(row, less):
    mean = sum(row)/len(row)
    return [(x - mean)/(math.sqrt(sum((x - mean)**2 for x in row)/max(len(row) - less, 1)) + 1e-7) for x in row]


def standardised(logits, answers, labels, weight, temperature, ce_weight, spread):
    total, less = 0., {'population': 0, 'sample': 1}[spread]
    for z, p, y in zip(logits, answers, labels, strict=True):
        scores = iter(z_row([math.log(x) for x in p if x > 0], less)) # a zero has none
        raised = [math.exp(next(scores)/temperature) if x > 0 else 0. for x in p]
        target, model = [r/sum(raised) for r in raised], soft([s/temperature for s in z_row(list(z), less)])
        total += ce_weight*-math.log(soft(z)[y]) + weight*temperature**2*divergence(target, model)
    return total/len(logits)


def centred(p):
    logs = [math.log(x) if x > 0 else math.log(min(x for x in p if x > 0)) - 5 for x in p]
    return np.array(logs) - sum(logs)/len(logs)


def amplified(logits, answers, labels, form='residual', kappa=1., epsilon=.1, mean_scale=1., weight=.9, temperature=4., heard=()):
    "`heard`: answers and labels of earlier batches."
    known = [(centred(p), y) for batch, its in heard for p, y in zip(batch, its, strict=True)]
    known += [(centred(p), y) for p, y in zip(answers, labels, strict=True)]
    total, C = 0., len(logits[0])
    for z, p, y in zip(logits, answers, labels, strict=True):
        own = np.stack([c for c, label in known if label == y])
        mean = own.mean(0)
        residual = kappa*(centred(p) - mean)/(np.sqrt(((own - mean)**2).mean()) + 1e-6)
        if form == 'residual':
            target = soft([math.log((1 - epsilon)*(k == y) + epsilon/C) + residual[k] for k in range(C)])
            total += cross(target, soft(z))
        else:
            target, model = soft((mean_scale*mean + residual)/temperature), soft(z/temperature)
            total += (1 - weight)*-math.log(soft(z)[y]) + weight*temperature**2*divergence(target, model)
    return total/len(logits)


GOLDEN = [*(('anchored', {'weight': w, 'temperature': T}, anchored) for w, T in [(0, 1), (.3, .5), (.5, 4), (1, 2)]),
          *(('ttm', {'weight': b, 'power': g}, ttm) for b, g in [(45, .1), (1, 1), (9, 2)]),
          *(('wttm', {'weight': b, 'power': g}, lambda *a, **k: ttm(*a, **k, weighted=True)) for b, g in [(2.25, .1), (1, .5), (.3, 2)]),
          *(('standardised', {'weight': w, 'temperature': T, 'ce_weight': c, 'spread': s}, standardised)
            for w, T, c, s in [(9, 2, .1, 'population'), (9, 2, .1, 'sample'), (.5, 4, 1, 'population')]),
          *(('amplified', {'kappa': k, 'epsilon': e}, amplified) for k, e in [(1, .1), (.3, .5), (3, .01), (0, .2)]),
          *(('amplified', {'form': 'rebuilt', 'kappa': k, 'mean_scale': m, 'weight': w, 'temperature': T}, amplified)
            for k, m, w, T in [(1, 1, .9, 4), (2, .5, .5, 1), (0, 1, .9, 2)])]


@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('B, C, scale', CASES)
@pytest.mark.parametrize('name, options, formula', GOLDEN, ids=[f'{n}-{"-".join(map(str, o.values()))}' for n, o, _ in GOLDEN])
def test_the_formula_number_by_number(name, options, formula, B, C, scale, zeros):
    student, teacher, labels = case(B, C, scale, zeros=zeros)
    expected = formula(student.numpy(), teacher.exp().numpy(), labels.tolist(), **options)
    assert made(name, C, **options)(student, teacher, labels).item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
    single = made(name, C, **options)(student.float(), teacher.float(), labels).item()
    assert single == pytest.approx(expected, rel=1e-3 if name == 'amplified' else 1e-4, abs=1e-5)


@pytest.mark.parametrize('form', ['residual', 'rebuilt'])
def test_amplified_remembers_every_batch(form):
    thief, heard = made('amplified', 4, form=form), []
    for seed in range(4):
        student, teacher, labels = case(7, 4, 2., seed)
        expected = amplified(student.numpy(), teacher.exp().numpy(), labels.tolist(), form=form, heard=heard)
        assert thief(student, teacher, labels).item() == pytest.approx(expected, rel=1e-9)
        heard.append((teacher.exp().numpy(), labels.tolist()))


def test_the_defaults_are_those_that_the_notebooks_state():
    assert attack.options('anchored') == {'weight': .5, 'temperature': 1.}
    assert attack.options('ttm') == {'weight': 45., 'power': .1} and attack.options('wttm') == {'weight': 2.25, 'power': .1}
    published = {'weight': 9., 'temperature': 2., 'ce_weight': .1, 'spread': 'population'}
    assert attack.options('standardised') == published
    assert attack.options('standardised', 'official') == published | {'spread': 'sample'}
    assert attack.options('amplified', 'rebuilt') == attack.options('amplified') | {'form': 'rebuilt'}


@pytest.mark.parametrize('name', NAMES)
def test_tuned_settings_are_as_many_as_the_reference_has(name):
    choices = attack.note(name, 'tuned')
    assert len(choices) == len({str(choice) for choice in choices}) == len(EPSILONS)
    for choice in choices: made(name, 5, **choice)
    assert attack.note(name, 'grid') is None and attack.note(name, 'label') and name not in ATTACKS


# The null arms.

@given(w=st.floats(0, 1), T=st.floats(.25, 8), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_anchored_by_uniform_answers_is_label_smoothing(w, T, seed):
    student, _, labels = case(6, 5, 3., seed)
    flat = torch.zeros_like(student).log_softmax(1)
    value = made('anchored', 5, weight=w, temperature=T)(student, flat, labels)
    torch.testing.assert_close(value, F.cross_entropy(student, labels, label_smoothing=w), rtol=1e-12, atol=1e-12)


@given(epsilon=st.floats(.001, .999), seed=st.integers(0, 999), zeros=st.booleans())
@settings(max_examples=25, deadline=None)
def test_amplified_by_nothing_is_label_smoothing(epsilon, seed, zeros):
    student, teacher, labels = case(6, 5, 3., seed, zeros)
    value = made('amplified', 5, kappa=0, epsilon=epsilon)(student, teacher, labels)
    torch.testing.assert_close(value, F.cross_entropy(student, labels, label_smoothing=epsilon), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('form', ['residual', 'rebuilt'])
def test_answers_that_are_all_the_same_are_the_null_arm(form):
    "Top-1 answers, centroids, or any answer that depends on the class alone: rounding is not amplified."
    student, rows, labels = case(40, 5, 3.)
    for answers in (rows[:5][labels], torch.eye(5).log()[labels], rows[:5].float()[labels].double()):
        plain, null = (made('amplified', 5, form=form, kappa=kappa)(student, answers, labels) for kappa in (1., 0.))
        torch.testing.assert_close(plain, null, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('name, none', [('anchored', {'weight': 0}), ('ttm', {'weight': 0}), ('wttm', {'weight': 0}),
                                        ('standardised', {'weight': 0, 'ce_weight': 1})])
def test_without_weight_there_is_only_the_label(name, none):
    student, teacher, labels = case(8, 10, 3., zeros=True)
    torch.testing.assert_close(made(name, 10, **none)(student, teacher, labels), F.cross_entropy(student, labels), rtol=1e-12, atol=1e-12)


# What they do not see.

@given(T=st.floats(.05, 20), seed=st.integers(0, 999), zeros=st.booleans(), variant=st.sampled_from(['recommended', 'official']))
@settings(max_examples=40, deadline=None)
def test_standardised_does_not_see_the_temperature_of_the_release(T, seed, zeros, variant):
    "Up to the 1e-7 beside a standard deviation of about 2/T."
    student, teacher, labels = case(6, 8, 2., seed, zeros)
    thief = made('standardised', 8, variant)
    plain, other = (thief(student, answers, labels) for answers in (teacher, power_transform(teacher, temperature=T)))
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
    shifted = thief(student, teacher, labels) - thief(student*3 + 1, teacher, labels)
    hard = .1*(F.cross_entropy(student, labels) - F.cross_entropy(student*3 + 1, labels))
    torch.testing.assert_close(shifted, hard, rtol=1e-4, atol=1e-4) # nor the student's own scale


@given(t=st.sampled_from([1., .3, .1, .01, .001]), seed=st.integers(0, 999), form=st.sampled_from(['residual', 'rebuilt']))
@settings(max_examples=40, deadline=None)
def test_amplified_does_not_see_a_mixture_with_the_geometric_centroid(t, seed, form):
    student, teacher, labels = case(30, 5, 2., seed)
    moments, rows = ClassMoments(5), centred_log_probs(teacher)
    moments.update(rows, labels)
    own = moments.means[labels]
    hidden = (t*rows + (1 - t)*own).log_softmax(1)
    plain, other = made('amplified', 5, form=form), made('amplified', 5, form=form)
    torch.testing.assert_close(other(student, hidden, labels), plain(student, teacher, labels), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(other.moments.means, plain.moments.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other.moments.spread(), t*plain.moments.spread(), rtol=1e-6, atol=1e-12)


def test_what_amplified_does_not_see_is_what_cmi_sees():
    _, teacher, labels = case(200, 5, 2.)
    moments, rows = ClassMoments(5), centred_log_probs(teacher)
    moments.update(rows, labels)
    values = [cmi((t*rows + (1 - t)*moments.means[labels]).log_softmax(1), labels).item() for t in (.1, .01)]
    assert values[1] < 1e-3 and 80 < values[0]/values[1] < 120 # of order t squared


# State, processes of training, and arguments.

def test_the_moments_are_those_of_all_rows_and_lose_no_digits():
    rows, labels = 1e8 + torch.randn(90, 4, dtype=torch.float64), torch.arange(90) % 3
    moments = ClassMoments(4)
    for part in torch.arange(90).split(13): moments.update(rows[part], labels[part])
    for y in range(3):
        own = rows[labels == y]
        torch.testing.assert_close(moments.means[y], own.mean(0), rtol=1e-15, atol=0)
        torch.testing.assert_close(moments.spread()[y], (own - own.mean(0)).square().mean().sqrt(), rtol=1e-6, atol=0)
    assert moments.counts.tolist() == [30, 30, 30, 0] and moments.spread()[3] == 0


def _learner(name, folder):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return Learner(name, net, made(name, 10), Recipe(epochs=3, batch_size=64, lr=.01), folder=folder)


def teacher(images): return (images.flatten(1) @ torch.linspace(-1, 1, 640).view(64, 10)).log_softmax(1)


def test_a_checkpoint_holds_the_class_means(tmp_path):
    "A run stopped after two epochs and taken up again ends as one that was never stopped."
    data = dataset('digits', per_class=32, test_per_class=5)
    whole, cut, again = (_learner('amplified', tmp_path/place) for place in ('whole', 'cut', 'cut'))
    train([whole], data, 0, teacher, Settings(device='cpu'))

    class Stop(Exception): "Ends a run from outside."
    def stop():
        if cut.epoch == 2 and cut.done == 2: raise Stop
    observe = cut.objective.observe
    def watched(*args):
        stop()
        return observe(*args)
    cut.objective.observe = watched
    with pytest.raises(Stop): train([cut], data, 0, teacher, Settings(device='cpu'))
    train([again], data, 0, teacher, Settings(device='cpu'))
    for name, value in whole.objective.state_dict().items(): assert torch.equal(value, again.objective.state_dict()[name]), name
    for name, value in whole.model.state_dict().items(): assert torch.equal(value, again.model.state_dict()[name]), name
    assert whole.objective.moments.counts.sum() == 3*320


def test_runs_that_train_together_do_not_share_means():
    data = dataset('digits', per_class=16, test_per_class=5)
    alone, one, other = (_learner('amplified', None) for _ in range(3))
    train([alone], data, 0, teacher, Settings(device='cpu'))
    train([one, other], data, 0, teacher, Settings(device='cpu'))
    for learner in (one, other):
        assert torch.equal(learner.objective.moments.means, alone.objective.moments.means)
        assert torch.equal(learner.model[1].weight, alone.model[1].weight)


@pytest.mark.parametrize('name, options, message', [
    ('anchored', {'weight': 1.1}, 'weight is 1.1; it must be a number from 0 up to 1'), ('anchored', {'temperature': 0}, 'temperature is 0'),
    ('ttm', {'power': 0}, 'power is 0; it must be a number above 0'), ('wttm', {'weight': -1}, 'weight is -1'),
    ('standardised', {'ce_weight': -.1}, 'ce_weight is -0.1'), ('standardised', {'spread': 'iqr'}, "Unknown spread 'iqr'; accepted: population, sample"),
    ('amplified', {'kappa': -1}, 'kappa is -1'), ('amplified', {'epsilon': 0}, 'epsilon is 0'), ('amplified', {'epsilon': 1}, 'epsilon is 1'),
    ('amplified', {'mean_scale': math.nan}, 'mean_scale is nan'), ('amplified', {'form': 'both'}, "Unknown form 'both'; accepted: residual, rebuilt"),
    ('amplified', {'form': 'rebuilt', 'weight': 2}, 'weight is 2')])
def test_options_out_of_range_are_one_clear_sentence(name, options, message):
    with pytest.raises(Invalid, match=message): made(name, 4, **options)
