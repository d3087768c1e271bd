"""What a table makes of runs that diverged, of candidates that were not finished everywhere, and of seeds without a partner."""
import math

import pandas as pd
import pytest
import torch

from cmim_repro.defenses.centroids import ResampleBank
from cmim_repro.lab.training import Batch
from cmim_repro.report.results import chosen, verdicts
from cmim_repro.report.statistics import welch


def line(column, seed, accuracy, choice='', held_out=None, diverged=False):
    shown = math.nan if diverged else accuracy
    return {'data': 'digits', 'defense': 'ce', 'teacher': 'a', 'student': 'b', 'column': column, 'choice': choice, 'seed': seed,
            'last': shown, 'best': shown, 'held_out': math.nan if diverged else held_out or accuracy, 'diverged': diverged}


@pytest.mark.parametrize('selection', ['clean', 'paper'])
def test_a_candidate_that_diverged_with_some_seed_does_not_win(selection):
    steady = [line('dkd', seed, 70. + seed, 'steady') for seed in range(3)]
    lucky = [line('dkd', 0, 90., 'lucky'), *(line('dkd', seed, 0., 'lucky', diverged=True) for seed in (1, 2))]
    picked = chosen(pd.DataFrame(lucky + steady), selection)
    assert set(picked['choice']) == {'steady'} and picked['accuracy'].notna().sum() == 3
    only = chosen(pd.DataFrame([*lucky, *(line('dkd', seed, 0., 'lost', diverged=True) for seed in range(3))]), selection)
    assert set(only['choice']) == {'lucky'}


def test_n_counts_pairs():
    rows = [line('ls', seed, 70. + seed) for seed in (0, 1, 2)] + [line('kd', seed, 72.) for seed in (2, 3, 4)]
    assert verdicts(chosen(pd.DataFrame(rows)))['n'].tolist() == [1]


def test_a_diverged_run_is_named_beside_the_verdict():
    rows = [line('ls', seed, 70. + .1*seed) for seed in range(4)] + [line('kd', seed, 80. + .2*seed) for seed in range(3)]
    [told] = verdicts(chosen(pd.DataFrame([*rows, line('kd', 3, 0., diverged=True)])))['why']
    assert told.endswith('Left out, because they diverged: 1 of KD.')
    [told] = verdicts(chosen(pd.DataFrame(rows)))['why']
    assert 'diverged' not in told


def test_welch_without_spread_has_no_interval():
    found = welch(72., 0., 71., 0.)
    assert found['mean'] == 1 and all(math.isnan(found[key]) for key in ('low', 'high', 'p_up', 'p_down'))


@pytest.mark.parametrize('augment', ['none', 'standard'])
def test_resampled_images_are_augmented_as_those_of_training(augment):
    asked = []

    class Data:
        def take(self, split, indices, augment, key):
            asked.append(augment)
            return torch.zeros(len(indices), 1, 2, 2)

    labels = torch.arange(6) % 3
    batch = Batch(torch.zeros(6, 1, 2, 2), labels, torch.arange(6), None, 0, 0, 0, augment=augment)
    ResampleBank(labels, 3, 2).before_step(lambda images: torch.zeros(len(images), 3).log_softmax(1), Data(), batch)
    assert asked == [augment]
