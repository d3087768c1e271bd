"""What a table makes of runs that diverged, of candidates that were not finished everywhere, and of seeds without a partner."""
import math

import pandas as pd
import pytest
import torch

from cmim_repro.core import Invalid
from cmim_repro.defenses.centroids import ResampleBank
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.profiles import Entry, narrowed, profile
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Batch, Recipe, Settings
from cmim_repro.report.results import chosen, results_frame, rule_note, student_entries, verdicts
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
    assert verdicts(pd.DataFrame(rows))['n'].tolist() == [1]


def test_a_diverged_run_is_named_beside_the_verdict():
    rows = [line('ls', seed, 70. + .1*seed) for seed in range(4)] + [line('kd', seed, 80. + .2*seed) for seed in range(3)]
    [told] = verdicts(pd.DataFrame([*rows, line('kd', 3, 0., diverged=True)]))['why']
    assert told.endswith('Left out, because they diverged: 1 of KD.')
    [told] = verdicts(pd.DataFrame(rows))['why']
    assert 'diverged' not in told


def test_a_verdict_rests_on_held_out_choices_and_the_papers_rule_on_its_own():
    "The test images prefer the candidate that the held-out images refuse; each rule has its own LS student."
    rows = [line('kd', seed, 71. + .1*seed) for seed in range(5)]
    rows += [line('ls', seed, 70. + .12*seed, 'epsilon=0.1', held_out=80.) for seed in range(5)]
    rows += [line('ls', seed, 73. + .1*seed, 'epsilon=0.5', held_out=60.) for seed in range(5)]
    [found] = verdicts(pd.DataFrame(rows)).to_dict('records')
    assert (found['verdict'], found['paper rule'], found['n']) == ('distillable', 'undistillable', 5)
    [wide] = verdicts(pd.DataFrame(rows), margin=2.).to_dict('records')
    assert wide['verdict'] == 'undistillable' # within two points


def test_where_nothing_is_held_out_half_of_the_test_images_choose_and_the_others_judge(tmp_path):
    plan = {'recipe': Recipe(epochs=1, batch_size=32), 'data_options': {'per_class': 10, 'test_per_class': 9}}
    run = make_run('digits', 'cnn_tiny', 'ls', **plan)
    store = Store(tmp_path)
    execute(Plan.of([run]), store, Settings(device='cpu'))
    answers, labels = store.log_probs(run)
    right = (answers.argmax(1) == labels).double()
    found = store.result(run)
    assert (found['choosing_accuracy'], found['judging_accuracy']) == (right[::2].mean(), right[1::2].mean())
    [row] = results_frame([Entry('digits', 'ce', 'a', 'b', 'ls', '', 0, run)], store).to_dict('records')
    assert (row['held_out'], row['judged'], row['last']) == tuple(100*found[f'{name}accuracy'] for name in ('choosing_', 'judging_', ''))
    note = rule_note([Entry('digits', 'ce', 'a', 'b', 'ls', '', 0, run)], 'clean', 'last', .5)
    assert 'chosen on every other test image' in note and 'a gain above 0.5 points' in note and 'on one fixed test set' in note


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
    ResampleBank(labels, 3, 2, per_class=2).before_step(lambda images: torch.zeros(len(images), 3).log_softmax(1), Data(), batch)
    assert asked == [augment]


def row(defense, column, level, spread=.1, choice='', held_out=None):
    accuracies = [level + spread*(seed % 3) for seed in range(5)]
    return [{**line(column, seed, accuracy, choice, held_out or level), 'defense': defense} for seed, accuracy in enumerate(accuracies)]


def test_a_gain_that_a_null_arm_has_too_is_no_knowledge():
    "DKD gains five points from anything, KD two from the teacher alone; what DKD gains beyond its null arms is half a point less."
    rows = row('ce', 'ls', 70., .2) + row('ce', 'dkd', 75.) + row('ce', 'kd', 72.)
    rows += row('shuffled', 'ls', 70., .2) + row('shuffled', 'dkd', 75.5, .3) + row('shuffled', 'kd', 66., .3)
    rows += row('uniform', 'ls', 70., .2) + row('uniform', 'dkd', 60., .3) + row('uniform', 'kd', 65., .3)
    found = verdicts(pd.DataFrame(rows)).set_index('defense')
    assert found.loc['ce', ['verdict', 'knowledge']].tolist() == ['distillable', 'distillable']
    assert found.loc['ce', 'knowledge: why'].startswith('KD gains')
    without = verdicts(pd.DataFrame([r for r in rows if r['column'] != 'kd'])).set_index('defense')
    assert without.loc['ce', ['verdict', 'knowledge']].tolist() == ['distillable', 'undistillable']
    assert without.loc['shuffled', ['verdict', 'knowledge']].tolist() == ['distillable', ''] # it is what others are compared with


def test_without_null_arms_nothing_is_said_of_knowledge():
    assert verdicts(pd.DataFrame(row('ce', 'ls', 70.) + row('ce', 'kd', 72.)))['knowledge'].tolist() == ['']


def test_the_null_arm_is_chosen_on_held_out_images():
    "The test images prefer the null arm, the held-out ones LS: the gain is over LS."
    rows = row('ce', 'ls', 70., .2, held_out=80.) + row('ce', 'kd', 72.) + row('uniform', 'ls', 70., .2, held_out=80.)
    rows += row('uniform', 'kd', 75., held_out=60.)
    assert verdicts(pd.DataFrame(rows)).set_index('defense').loc['ce', 'knowledge'] == 'distillable'


def test_tuned_attacks_are_judged_in_a_line_of_their_own():
    "Their settings are chosen on held-out images, and compared with tuned null arms."
    rows = row('ce', 'ls', 70., .2) + row('ce', 'kd', 69.) + row('ce', 'kd tuned', 69., .1, 'weight=0.9') + row('ce', 'kd tuned', 73., .1, 'weight=0.1')
    rows += row('uniform', 'ls', 70., .2) + row('uniform', 'kd', 60.) + row('uniform', 'kd tuned', 74., .2)
    found = verdicts(pd.DataFrame(rows)).set_index(['defense', 'attacks'])
    assert found['verdict'].loc['ce'].to_dict() == {'as printed': 'undistillable', 'tuned': 'distillable'}
    assert found['knowledge'].loc['ce'].to_dict() == {'as printed': 'undistillable', 'tuned': 'undistillable'}
    assert 'KD tuned' in found.loc[('ce', 'tuned'), 'why']


def test_the_note_says_how_many_images_a_thief_has():
    def note(overrides):
        return rule_note(student_entries(narrowed(profile('smoke'), overrides=overrides)), 'clean', 'last')

    assert 'Students have 5 images of each class, their teachers 20.' in note('thief_images=.25')
    assert 'Students have' not in note('')


def columns_of(**asked): return list(dict.fromkeys(e.column for e in student_entries(narrowed(profile('smoke'), **asked))))


def test_attacks_are_tuned_all_or_by_name_and_once_each():
    assert columns_of(attacks='kd, dkd', tuned=True) == ['model', 'kd', 'dkd', 'kd tuned', 'dkd tuned', 'ls']
    assert columns_of(attacks='kd, dkd', tuned='dist, kd') == ['model', 'kd', 'dkd', 'dist tuned', 'kd tuned', 'ls']
    assert columns_of(attacks='kd, kd:weight=.5', tuned=True) == ['model', 'kd', 'kd:weight=.5', 'kd tuned', 'ls']
    with pytest.raises(Invalid, match="Unknown attack 'kdd'"): narrowed(profile('smoke'), tuned='kdd')
