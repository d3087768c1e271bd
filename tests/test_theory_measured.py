"Whatever measures takes log-probabilities and labels 0..C-1, as tensors, arrays or lists, and refuses everything else in one sentence."
import numpy as np
import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid
from cmim_repro.defenses.core import objective
from cmim_repro.report.figures import simplex_figure, simplex_html, simplex_points
from cmim_repro.theory import distributions
from cmim_repro.theory.cmi import CMIAccumulator, class_centroids, class_cmi, class_mean, class_power_transform, cmi, cmi_curve
from cmim_repro.theory.distributions import covariance, entropy, kl, log_mixture, power_transform, second_moment
from cmim_repro.theory.theorem1 import log_mean_exp, smooth_maximum
from cmim_repro.theory.theorem2 import cmi_curvature, cmi_derivative

B, C = 30, 5
LOGITS = 2*torch.randn(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
ROWS, LABELS, ALPHAS = LOGITS.log_softmax(-1), torch.arange(B) % C, torch.tensor([0., .5, 1, 3], dtype=torch.float64)
GOOD = ROWS.flip(0)

# Of rows alone; of rows and labels.
OF_ROWS = {'entropy': entropy, 'kl, P': lambda x: kl(x, GOOD), 'kl, Q': lambda x: kl(GOOD, x), 'log_mixture': log_mixture, 'second_moment': second_moment,
           'covariance, P': lambda x: covariance(x, GOOD), 'covariance, Q': lambda x: covariance(GOOD, x)}
OF_BOTH = {'class_centroids': class_centroids, 'class_cmi': class_cmi, 'cmi': cmi, 'cmi_curve': lambda x, y: cmi_curve(x, y, ALPHAS),
           'cmi_curve of each class': lambda x, y: cmi_curve(x, y, ALPHAS, per_class=True), 'CMIAccumulator': lambda x, y: CMIAccumulator(ALPHAS, C).update(x, y).cmi(),
           'cmi_derivative': cmi_derivative, 'cmi_curvature': cmi_curvature, 'simplex_points': lambda x, y: torch.from_numpy(simplex_points(x, y, [0, 1, 2])[0]),
           'simplex_figure': lambda x, y: simplex_figure({'model': (x, y)}, [0, 1, 2]), 'simplex_html': lambda x, y: simplex_html({'model': (x, y)}, [0, 1, 2])}
MEASURES = {**{name: lambda x, _, f=f: f(x) for name, f in OF_ROWS.items()}, **OF_BOTH}
NUMBERS = [name for name in MEASURES if name not in ('simplex_figure', 'simplex_html')]
P = ROWS.exp()
WRONG_ROWS = {'probabilities': (P, 'they look like probabilities'), 'probabilities in single precision': (P.float(), 'they look like probabilities'),
              'logits': (LOGITS, 'they look like logits'), 'per cent': (100*P, 'they look like per cents'), 'bytes': ((255*P).round().to(torch.uint8), 'of type torch.uint8'),
              'classes': (torch.ones(B, C, dtype=torch.int64), 'of type torch.int64'), 'NaN': (ROWS.clone().index_fill_(0, torch.tensor([7]), torch.nan), 'hold NaN'),
              'zeros alone': (ROWS.clone().index_fill_(0, torch.tensor([7]), -torch.inf), 'row of -inf only'),
              'one row of logits': (torch.cat([ROWS[:-1], LOGITS[-1:]]), '1 of 30 rows')}
WRONG_LABELS = {'-100': (LABELS.clone().index_fill_(0, torch.tensor([3]), -100), 'from -100 to 4; .* leave those rows out'), 'from 1': (LABELS + 1, 'they seem to count from 1'),
                'too large': (LABELS*10, 'from 0 to 40; they must be from 0 to 4'), 'floats': (LABELS.double(), 'they must be whole numbers'), 'too few': (LABELS[1:], r'\(29,\)')}


@pytest.mark.parametrize('wrong', WRONG_ROWS)
@pytest.mark.parametrize('measure', MEASURES)
def test_rows_that_are_no_log_probabilities_are_refused(measure, wrong):
    rows, message = WRONG_ROWS[wrong]
    for given in rows, rows.numpy():
        with pytest.raises(Invalid, match=message) as caught: MEASURES[measure](given, LABELS)
        assert str(caught.value).count('\n') == 0 and str(caught.value).endswith('.')


@pytest.mark.parametrize('wrong', WRONG_LABELS)
@pytest.mark.parametrize('measure', OF_BOTH)
def test_labels_that_are_none_are_refused(measure, wrong):
    labels, message = WRONG_LABELS[wrong]
    for given in labels, labels.numpy():
        with pytest.raises(Invalid, match=message): MEASURES[measure](ROWS, given)


@pytest.mark.parametrize('measure', NUMBERS)
def test_arrays_and_lists_give_the_numbers_of_tensors(measure):
    expected = MEASURES[measure](ROWS, LABELS)
    read_only = ROWS.numpy().copy()
    read_only.flags.writeable = False
    for rows, labels in ((ROWS.numpy(), LABELS.numpy()), (ROWS.numpy(), LABELS), (ROWS, LABELS.numpy().astype(np.uint8)), (ROWS.tolist(), LABELS.tolist()),
                         (ROWS.flip(0).numpy()[::-1], LABELS.flip(0).numpy()[::-1]), (read_only, LABELS.int())):
        assert torch.equal(MEASURES[measure](rows, labels), expected)


@pytest.mark.parametrize('measure', OF_BOTH)
def test_zeros_and_rounded_answers_are_measured(measure):
    two_digits = (P*100).round().div(100).log() # zeros and all
    two_digits = two_digits[(two_digits.exp().sum(1) - 1).abs() < .001]
    zeros = ROWS.masked_fill(torch.nn.functional.one_hot((LABELS + 1) % C, C).bool(), -torch.inf).log_softmax(-1)
    for rows in (two_digits, zeros, zeros.float(), ROWS.half(), ROWS.bfloat16()): MEASURES[measure](rows, LABELS[:len(rows)])


def test_powers_may_be_arrays_or_lists():
    own, several = torch.rand(C, dtype=torch.float64), torch.rand(C, 3, dtype=torch.float64)
    for f in (class_centroids, class_cmi, cmi, cmi_derivative, class_power_transform):
        for alpha in own, several:
            for given in alpha.numpy(), alpha.tolist(): assert torch.equal(f(ROWS, LABELS, given), f(ROWS, LABELS, alpha))
        for given in np.float64(.3), np.array(.3), torch.tensor(.3, dtype=torch.float64): assert torch.equal(f(ROWS, LABELS, given), f(ROWS, LABELS, .3))
    for given in ALPHAS.numpy(), ALPHAS.tolist(), ALPHAS.flip(0).numpy()[::-1]: assert torch.equal(cmi_curve(ROWS, LABELS, given), cmi_curve(ROWS, LABELS, ALPHAS))
    assert torch.equal(power_transform(ROWS.numpy(), [[2.]]*B), power_transform(ROWS, torch.full((B, 1), 2., dtype=torch.float64)))
    assert torch.equal(class_mean(ROWS.numpy(), LABELS.tolist(), C), class_mean(ROWS, LABELS, C))
    for function in class_mean, class_power_transform:
        with pytest.raises(Invalid, match='leave those rows out'): function(ROWS, WRONG_LABELS['-100'][0], C if function is class_mean else own)


def test_smooth_maxima_of_arrays():
    values, omegas = torch.rand(6, 4, dtype=torch.float64), torch.tensor([1., 25.], dtype=torch.float64)
    assert torch.equal(log_mean_exp(values.numpy(), 25), log_mean_exp(values, 25)) and torch.equal(log_mean_exp(values.tolist(), 25), log_mean_exp(values, 25))
    for given in omegas.numpy(), omegas.tolist(): assert torch.equal(smooth_maximum(lambda t: t, 2, given), smooth_maximum(lambda t: t, 2, omegas))
    assert torch.equal(smooth_maximum(lambda t: cmi_curve(ROWS, LABELS, t).numpy(), 2, 25.), smooth_maximum(lambda t: cmi_curve(ROWS, LABELS, t), 2, 25.))


def test_one_row_alone_is_checked_as_well():
    for wrong in P[0], torch.tensor(0.), torch.zeros(0):
        with pytest.raises(Invalid): entropy(wrong)
    assert entropy(ROWS[0]).ndim == 0 and entropy(ROWS.view(5, 6, C)).shape == (5, 6)


def test_a_power_transform_takes_logits():
    assert torch.allclose(power_transform(LOGITS, .7), power_transform(ROWS, .7)) and torch.allclose(class_power_transform(LOGITS, LABELS, ALPHAS[1]), power_transform(ROWS, .5))


@pytest.mark.parametrize('name', ['apgp', 'nt', 'snt', *(f'{name} (attack)' for name in ('avg', 'dist', 'dkd', 'htc', 'kd', 'mkd'))])
def test_a_step_of_training_does_not_read_values(name, monkeypatch):
    def refuse(*_): raise AssertionError('values were read')
    monkeypatch.setattr(distributions, 'check_log_probs', refuse)
    options = {'snt': {'num_classes': C, 'superclasses': [0, 0, 1, 1, 1]}, 'mkd (attack)': {'num_classes': C}}.get(name, {})
    module = attack(name.split()[0], **options) if name.endswith('(attack)') else objective(name, **options)
    assert module.double()(LOGITS.clone().requires_grad_(), GOOD, LABELS, 0).isfinite()
