"What the exhibits beyond the paper compute, on known numbers."
import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from cmim_repro.core import Invalid
from cmim_repro.exhibits import beyond1, beyond2
from cmim_repro.exhibits.table1 import entries as table1_entries
from cmim_repro.experiments.execution import execute, load_data
from cmim_repro.experiments.profiles import profile
from cmim_repro.experiments.runs import Plan
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Settings
from cmim_repro.report.formats import to_text
from cmim_repro.report.results import chosen, results_frame
from cmim_repro.theory.cmi import cmi_curve

SMOKE = profile('smoke')
LABELS = torch.arange(200) % 10


@pytest.fixture
def store(tmp_path): return Store(tmp_path)


def outputs(spread, key=0):
    noise = torch.randn(200, 10, generator=torch.Generator().manual_seed(key))
    return (spread*noise + 6*torch.eye(10)[LABELS]).log_softmax(-1)


def finish(store, run, accuracy, log_probs=None):
    store.start(run)
    if log_probs is not None:
        kept = {split: log_probs for split in ('train', 'test')} | {f'{split}_labels': LABELS for split in ('train', 'test')}
        store.save_tensors(run, 'log_probs.safetensors', kept)
    source = {'seconds': 1., 'device_name': 'none', 'torch': '0', 'revision': 'none', 'data': {'verified': True}}
    store.finish(run, {'accuracy': accuracy, 'best_accuracy': accuracy, 'held_out_accuracy': accuracy, **source})


# ---- mixed answers

def test_the_ends_are_runs_of_table_1():
    assert [beyond1.arm(t) for t in (1, .1, 0)] == ['ce', 'mixed:t=0.1', 'centroid']
    assert [beyond1.arm(t, 2) for t in (1., .1, 0.)] == ['rounding:digits=2', 'mixed:t=0.1:digits=2', 'mixed:t=0:digits=2']
    asked = {'attacks': 'kd, dist, standardised, amplified', 'defenses': 'centroid', 'null_arms': 'none', 'tuned': True}
    known = {run.id for run in Plan.of([e.run for e in table1_entries(SMOKE, **asked)]).runs}
    for e in beyond1.entries(SMOKE):
        if e.defense in ('ce', 'centroid'): assert e.run.id in known, e


def test_six_columns_unless_others_are_asked_for():
    assert {e.column for e in beyond1.entries(SMOKE)} == {'model', 'ls', *beyond1.COLUMNS}
    assert {e.column for e in beyond1.entries(SMOKE, attacks='ttm')} == {'model', 'ls', 'ttm', 'ttm tuned'}
    thieves = {e.defense: e.run for e in beyond1.entries(SMOKE, '1, .1, 0', '2') if e.column == 'unmixed'}
    assert [run.method for run in thieves.values()] == ['kd', 'unmixed', 'kd'] # at the ends there is nothing to undo
    assert thieves['mixed:t=0.1:digits=2'].options['share'] == thieves['mixed:t=0.1:digits=2'].teacher.options['t'] == .1
    rows = {e.defense for e in beyond1.entries(SMOKE, '.5, 0', '0, 2')}
    assert rows == {'mixed:t=0.5', 'centroid', 'mixed:t=0.5:digits=2', 'mixed:t=0:digits=2'}
    assert {(e.data, e.teacher_model) for e in beyond1.entries(profile('paper'))} == {('cifar100', 'vgg16')}


@pytest.mark.parametrize('given, message', [
    ({'shares': 'some'}, "shares holds 'some'; write numbers with commas between."),
    ({'shares': '1.5'}, 'Value of shares is 1.5; it must be a number from 0 up to 1.'),
    ({'decimals': '2.5'}, "decimals holds '2.5'; write numbers with commas between."),
    ({'decimals': '12'}, 'Value of decimals is 12; it must be a whole number from 0 up to 9.')])
def test_bad_parameters_are_refused_in_a_sentence(given, message):
    with pytest.raises(Invalid) as refusal: beyond1.entries(SMOKE, **given)
    assert str(refusal.value) == message


GAINS = {'knowledge': {'mixed:t=0.1': 2., 'ce': 2.}, 'none': {'mixed:t=0.1': -1., 'ce': 2.}, 'open': {}}


def filled(store, gained, spread=None):
    "Entries with three seeds; every attack gains so much over LS, with a little noise; nothing from centroids."
    entries = beyond1.entries(SMOKE, seeds=3)
    random = np.random.default_rng(0)
    for e in entries:
        answers = outputs((spread or {}).get(e.defense, 1.), e.seed) if e.column == 'model' else None
        noise = {'open': 3.}.get(gained, .05)*random.normal()
        points = 0 if e.column in ('model', 'ls') else GAINS[gained].get(e.defense, -1.5 if gained == 'none' else 0) + noise
        if not store.finished(e.run): finish(store, e.run, .7 + .01*e.seed + points/100, answers)
    return entries


@pytest.mark.parametrize('gained, verdict', [('knowledge', 'disagrees'), ('none', 'agrees'), ('open', 'undecided')])
def test_the_smallest_share_decides(store, gained, verdict):
    entries = filled(store, gained)
    found = beyond1.answer(entries, results_frame(entries, store), store)
    assert found.verdict == verdict and found.because.startswith('Own share 0.1: largest CMI given the predicted class ')


def test_the_table_shows_cmi_and_gains(store):
    entries = filled(store, 'knowledge', {'ce': 2., 'mixed:t=0.1': .2})
    frame = results_frame(entries, store)
    table = beyond1.draw(entries, frame, store)
    assert [names[3:] for names, _ in table.rows] == [('1', 'all'), ('0.1', 'all'), ('0', 'all')]
    powers = torch.linspace(0, 4, 41, dtype=torch.float64)
    expected = np.mean([cmi_curve(outputs(.2, seed).double(), LABELS, powers).max() for seed in range(3)])
    assert table.rows[1][1][1] == f'{expected:.2g}'
    kd = dict(zip(table.columns, table.rows[1][1], strict=True))['kd']
    assert kd.n == 3 and abs(kd.mean - 2) < .1
    gains = beyond1.gains(frame)
    assert len(gains) == 3*6 and set(gains.query("defense != 'centroid'")['reading']) == {'higher'}
    over = beyond1.over_null(frame).set_index(['defense', 'column'])
    assert len(over) == 2*6 and abs(over['mean'] - 2).max() < .2 and set(over['reading']) == {'higher'}
    assert re.search(r'Gains over the centroids alone: KD \+[12]\.\d\d \(', beyond1.answer(entries, frame, store).because)
    [(key, shown)] = beyond1.picture(entries, frame, store).items()
    assert key == ('digits', 'cnn_small', 'cnn_tiny') and len(shown.data) == 18 and 'KD tuned' in to_text(table)


def test_measures_of_known_answers(store):
    entries = beyond1.entries(SMOKE, '1', seeds=1, attacks='kd')
    sharp = torch.full((200, 10), 1e-3).scatter(1, LABELS[:, None], 1 - 9e-3).log()
    for e in entries:
        if e.column == 'model': finish(store, e.run, .9, sharp)
    [line] = beyond1.measured(entries, store).to_dict('records')
    assert line['accuracy'] == 100 and abs(line['largest CMI']) < 1e-6 and abs(line['told apart']) < 1e-9
    assert beyond1.measured([e for e in entries if e.column != 'model'], store).empty


# ---- does CMI rank teachers?

def test_teachers_are_those_of_the_profile_and_three_more():
    for name in ('smoke', 'quick', 'paper'):
        entries = beyond2.entries(profile(name))
        models = [e for e in entries if e.column == 'model']
        assert {'ce', 'cmim', 'ls', 'ls:epsilon=0.2', 'cmim:weight=8'} <= {e.defense for e in models}
        ids = [e.run.id for e in models if (e.data, e.teacher_model, e.seed) == (models[0].data, models[0].teacher_model, 0)]
        assert len(ids) == len(set(ids)), name
    assert {e.defense for e in beyond2.entries(SMOKE, defenses='st')} == {'ce', 'st'}
    assert {e.column for e in beyond2.entries(SMOKE, attacks='ttm')} == {'model', 'ls', 'ttm tuned'}
    assert {e.seed for e in beyond2.entries(SMOKE)} == {0} and {e.seed for e in beyond2.entries(SMOKE, seeds=2)} == {0, 1}


@pytest.mark.parametrize('n', [4, 7, 12])
def test_rho_is_spearmans_with_and_without_ties(n):
    random = np.random.default_rng(n)
    for x, y in ((random.normal(size=n), random.normal(size=n)), (random.integers(3, size=n), random.normal(size=n))):
        found = beyond2.rank_correlation(x, y, draws=200)
        assert found['rho'] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert -1 - 1e-9 <= found['low'] <= found['high'] <= 1 + 1e-9 and found['n'] == n


def test_p_is_that_of_all_orders():
    x, y = np.arange(6.), np.array([1., 0, 2, 5, 3, 4])
    rho = stats.spearmanr(x, y).statistic
    every = [stats.spearmanr(x, order).statistic for order in itertools.permutations(y)]
    exact = np.mean(np.abs(every) >= abs(rho) - 1e-12)
    assert beyond2.rank_correlation(x, y)['p'] == pytest.approx(exact, abs=.02)


def test_readings_of_sure_and_open_orders():
    up = beyond2.rank_correlation(range(10), [v**3 for v in range(10)])
    assert up['rho'] == 1 and up['reading'] == 'higher'
    assert beyond2.rank_correlation(range(10), range(10, 0, -1))['reading'] == 'lower'
    one_outlier = beyond2.rank_correlation([0]*9 + [1], [0]*9 + [1])
    assert one_outlier['rho'] == pytest.approx(1) and one_outlier['reading'] == 'undecided' # p is .1
    assert beyond2.rank_correlation(range(10), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], key='a') == beyond2.rank_correlation(
        range(10), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], key='a')
    for hopeless in ((range(3), range(3)), ([1]*5, range(5)), ([1, 2, 3, np.nan, 5], [1, 2, np.nan, 4, 5])):
        assert beyond2.rank_correlation(*hopeless)['reading'] == ''


def test_no_order_is_seen_where_there_is_none():
    "With independent numbers the reading is wrong in about one of twenty."
    random = np.random.default_rng(0)
    found = [beyond2.rank_correlation(*random.normal(size=(2, 12)), draws=400, key=(i,))['reading'] for i in range(200)]
    assert np.mean([reading != 'undecided' for reading in found]) < .09


TEACHERS = 'st, cmim:weight=0.5, cmim, cmim:weight=8, ls'


def ranked(store, direction):
    "Teachers whose CMI and whose students' gains go up together, or against each other; DKD beats KD by two points."
    entries = beyond2.entries(SMOKE, defenses=TEACHERS, seeds=3)
    order = list(dict.fromkeys(e.defense for e in entries))
    for e in entries:
        place = order.index(e.defense)
        points = direction*place + 2*(e.column == 'dkd tuned') if e.column not in ('model', 'ls') else 0
        noise = .1*math.sin(place + 5*e.seed)
        answers = outputs(.5 + .3*place, e.seed) if e.column == 'model' else None
        if not store.finished(e.run): finish(store, e.run, .6 + (points + noise)/100, answers)
    return entries


@pytest.mark.parametrize('direction, verdict', [(1, 'agrees'), (-1, 'disagrees')])
def test_the_answer_follows_the_order(store, direction, verdict):
    entries = ranked(store, direction)
    frame = results_frame(entries, store)
    found = beyond2.answer(entries, frame, store)
    assert found.verdict == verdict and f'rho {direction:+.2f}' in found.because and '6 teachers' in found.because
    lines = beyond2.teachers(entries, frame, store)
    right, sure = beyond2.sure_pairs(lines)
    assert sure == 15 and right == (15 if direction > 0 else 0)
    ranks = beyond2.ranks(entries, frame, store)
    assert len(ranks) == 5*3 and set(ranks['gain of']) == {'KD tuned', 'DKD tuned', 'Best tuned'}
    assert (lines['best tuned'] == lines['dkd tuned']).all() and (lines['train'] == lines['test']).all()
    assert (lines['class'] >= lines['train']).all()
    table = beyond2.draw(entries, frame, store)
    assert len(table.rows) == 6 and [cell.n for cell in table.rows[0][1]] == [3]*8
    [(key, shown)] = beyond2.picture(entries, frame, store).items()
    assert key == ('digits', 'cnn_small', 'cnn_tiny') and len(shown.data) == 6


def test_the_best_is_chosen_on_held_out_images():
    "Not by the test images, on which KD is better."
    place = {'data': 'd', 'defense': 'ce', 'teacher': 't', 'student': 's', 'seed': 0, 'diverged': False, 'best': 0.}
    frame = pd.DataFrame([{**place, 'column': c, 'choice': 'x', 'held_out': h, 'last': a, 'judged': a}
                          for c, h, a in (('kd tuned', 50., 90.), ('dkd tuned', 60., 70.), ('ls', 99., 60.))])
    best = chosen(beyond2.with_best(frame)).query("column == 'best tuned'")
    assert best['judged'].tolist() == [70.] and best['choice'].tolist() == ['dkd tuned: x']


def test_mads_budget_is_no_budget_of_questions(store):
    "Its stored answers are about all training images; a store that was filled when they were not is mended."
    entries = beyond2.entries(SMOKE, defenses='mad')
    [run] = [e.run for e in entries if e.defense == 'mad' and e.column == 'model']
    student = next(e.run for e in entries if e.defense == 'mad' and e.column == 'kd tuned')
    assert run.options['budget'] == 1 and execute(Plan.of([student]), store, Settings(device='cpu')) == []
    data = load_data(run)
    log_probs, labels = store.log_probs(run, 'train')
    assert len(log_probs) == len(labels) == data.size('train') > 100
    kept = store.tensors(run, 'log_probs.safetensors')
    store.save_tensors(run, 'log_probs.safetensors', {**kept, 'train': kept['train'][:1], 'train_labels': kept['train_labels'][:1]})
    beyond1.keep_answers([e for e in entries if e.run == run], store, Settings(device='cpu'), load_data)
    torch.testing.assert_close(store.log_probs(run, 'train')[0], log_probs)


def test_no_teacher_no_table(store):
    entries = beyond2.entries(SMOKE)
    frame = results_frame(entries, store)
    assert beyond2.answer(entries, frame, store).because == 'Fewer than four teachers are finished.'
    assert beyond2.picture(entries, frame, store) == {} and beyond2.draw(entries, frame, store).rows == ()
