"Releases behind CMIM, and CMIM of standardised answers: by hand, their properties, and as runs."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.core import Invalid
from cmim_repro.defenses.baselines import Centroid, Rounding
from cmim_repro.defenses.cmim import CMIM
from cmim_repro.defenses.core import defense, objective, release
from cmim_repro.experiments.cost import operations
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.profiles import narrowed, profile, protected
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.paper import label
from cmim_repro.theory.cmi import cmi_curve

LABELS = torch.arange(40) % 4


def logits(key=0, C=4): return 3*torch.randn(len(LABELS), C, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def z_scores(rows): return (rows - rows.mean(1, keepdim=True))/rows.std(1, correction=0, keepdim=True)


def made(rows, **options):
    "The objective after it has seen `rows`, with the batch's own centroids."
    method = objective('cmim_standardised', num_classes=4, centroids='batch', **options)
    method.observe(rows.log_softmax(1), LABELS, None)
    return method


@pytest.mark.parametrize('weight, size', [(2., 1.), (.5, 3.), (8., .3)])
def test_the_term_is_the_cmi_of_z_scores(weight, size):
    "With one power the soft maximum is that power's CMI; the z-scores are written out again here."
    rows = logits()
    method = made(rows, weight=weight, size=size, count=1)
    [expected] = cmi_curve((size*z_scores(rows)).log_softmax(1), LABELS, method.bank.powers.double())
    value = method(rows, None, LABELS)
    torch.testing.assert_close(value, F.cross_entropy(rows, LABELS) + weight*expected, rtol=1e-5, atol=1e-6)


@given(key=st.integers(0, 99), scale=st.floats(.2, 20))
@settings(max_examples=20, deadline=None)
def test_it_does_not_see_how_large_a_row_is(key, scale):
    rows = logits(key)
    factors = scale**torch.linspace(-1, 1, len(rows), dtype=torch.float64)[:, None]
    values = [made(x).term(x, LABELS) for x in (rows, factors*rows + 5)]
    torch.testing.assert_close(*values, rtol=1e-2, atol=1e-3) # 1e-5 is added to the variance
    plain = objective('cmim', weight=2., num_classes=4, centroids='batch')
    plain.observe((.1*rows).log_softmax(1), LABELS, None)
    assert plain.term(.1*rows, LABELS) < .5*values[0] # CMIM is content with small


def test_its_gradient_is_that_of_the_value():
    rows = logits().requires_grad_()
    method = made(rows.detach(), count=3)
    assert torch.autograd.gradcheck(lambda z: method(z, None, LABELS), rows, eps=1e-6, atol=1e-5)


def test_without_weight_it_is_cross_entropy():
    rows = logits()
    torch.testing.assert_close(made(rows, weight=0.)(rows, None, LABELS), F.cross_entropy(rows, LABELS))


def test_resampled_centroids_are_standardised_too():
    rows, labels = logits().float(), torch.arange(40) % 4
    method = objective('cmim_standardised', num_classes=4, centroids='resample', train_labels=labels, per_class=10)
    class Images: take = staticmethod(lambda split, places, augment, key: places)
    class Batch: step, epoch, shares, labels, augment = 0, 0, (), LABELS, 'none'
    method.before_step(lambda places: rows[places].log_softmax(1), Images, Batch)
    other = objective('cmim_standardised', num_classes=4, centroids='batch')
    other.observe(rows.log_softmax(1), labels, None)
    torch.testing.assert_close(method.bank.log_centroids, other.bank.log_centroids, rtol=1e-5, atol=1e-6)


def test_options_out_of_range_are_one_clear_sentence():
    with pytest.raises(Invalid, match='size is 0; it must be a number above 0'): objective('cmim_standardised', size=0, num_classes=4)
    with pytest.raises(Invalid, match=r'lambda \(weight\) is -1'): objective('cmim_standardised', weight=-1, num_classes=4)


# ---- releases behind CMIM

def test_they_answer_as_the_releases_that_they_are():
    rows = logits().log_softmax(1)
    for digits in (1, 3): assert torch.equal(release('cmim_rounded', digits=digits)(rows), release('rounding', digits=digits)(rows))
    one, other = (release(name, num_classes=4) for name in ('cmim_centroid', 'centroid'))
    for module in (one, other): module.fit(rows)
    assert torch.equal(one(rows), other(rows))
    assert issubclass(release.entry('cmim_rounded'), Rounding) and issubclass(release.entry('cmim_centroid'), Centroid)


def test_a_release_says_what_it_is_behind():
    for name in release.names():
        if name == 'identity': continue
        expected = 'cmim' if name.startswith('cmim_') else 'ce'
        assert defense(name).objective == expected
        run = protected(*narrowed(profile('quick'), data_sets='digits', overrides='cmim.weight=3').tasks, name, 'cnn_medium', 4)
        assert (run.teacher.method, run.teacher.seed, run.method) == (expected, 4, name)
        assert expected == 'ce' or run.teacher.options['weight'] == 3
    facts = {'num_classes': 4, 'train_labels': LABELS, 'seed': 0}
    assert isinstance(defense('cmim_centroid').make_objective(**facts), CMIM)


def test_as_runs_in_a_store(tmp_path):
    common = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 20, 'test_per_class': 10, 'held_out': .2}}
    behind, store = make_run('digits', 'cnn_tiny', 'cmim', **common), Store(tmp_path)
    arms = [make_run('digits', 'cnn_tiny', name, teacher=behind, **common) for name in ('cmim_rounded', 'cmim_centroid')]
    arms.append(make_run('digits', 'cnn_tiny', 'cmim_standardised', **common))
    plan = Plan.of([make_run('digits', 'cnn_tiny', 'kd', teacher=arm, **common) for arm in arms]).check()
    assert execute(plan, store, Settings(device='cpu')) == [] and all(map(store.finished, plan.runs))
    for run in arms[:2]: assert store.result(run)['accuracy'] == store.result(behind)['accuracy']
    assert operations(arms[2])['cmim'] == operations(behind)['cmim'] > 0


def test_tables_call_them_by_a_name():
    assert [label(name) for name in ('cmim_rounded', 'cmim_centroid', 'cmim_standardised')] == ['CMIM, rounded', 'CMIM, centroid', 'CMIM of z-scores']
