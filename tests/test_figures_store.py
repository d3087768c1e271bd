"""Figures and Table 10 are functions of entries and store: change a number and they change, delete a run: it is out."""

import numpy as np
import pandas as pd
import pytest
import torch

from cmim_repro.exhibits import figure1, figure2, figure3, figure4, figure5, table10
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.store import Store
from cmim_repro.report.figures import save_picture
from cmim_repro.report.models import first_seed, model_curves, model_outputs
from cmim_repro.report.sweeps import ls_reference, sweep_frame, sweep_pictures, sweep_summary

ALPHAS = torch.linspace(0, 4, 17).tolist()
LABELS = torch.arange(80) % 10


def outputs_of(run, scale=1.):
    generator = torch.Generator().manual_seed(int(run.id, 16) % 2**31)
    return (scale*torch.randn(80, 10, generator=generator) + 5*torch.eye(10)[LABELS]).log_softmax(-1)


def write(store, run, accuracy, scale=1.):
    store.start(run)
    store.save_tensors(run, 'log_probs.safetensors', {'test': outputs_of(run, scale), 'test_labels': LABELS})
    store.finish(run, {'accuracy': accuracy, 'best_accuracy': accuracy + .01, 'held_out_accuracy': accuracy,
                       'seconds': 1.})


def change(store, run, **values):
    store.finish(run, {**store.result(run), **values})


@pytest.fixture
def models(tmp_path):
    store, entries = Store(tmp_path/'store'), figure2.entries(narrowed(profile('smoke'), seeds=2))
    for e in entries: write(store, e.run, .9)
    return store, entries


@pytest.fixture(params=[figure4, figure5, table10], ids=['beta', 'N', 'omega'])
def study(request, tmp_path):
    study, store = request.param.STUDY, Store(tmp_path/'store')
    entries = request.param.entries(profile('smoke'), seeds=3)
    for i, run in enumerate(dict.fromkeys(e.run for e in entries)): write(store, run, .5 + .001*i)
    return study, store, entries


def data_of(store, entries):
    "The data of Figures 1, 2 and 3."
    outputs = model_outputs(entries, store)
    [(key, found)] = outputs.items()
    curves = model_curves(outputs, ALPHAS)
    return {'figure1': figure1.class_frame(found['ce'], [0, 1, 2], ALPHAS),
            'peaks': figure1.peak_frame(found['ce'], [0, 1, 2]),
            'figure2': figure2.simplex_frame(first_seed(found), [0, 1, 2]),
            'clusters': figure2.cluster_frame(figure2.simplex_frame(first_seed(found), [0, 1, 2])),
            'figure3': pd.DataFrame({d: v.mean(0) for d, v in curves[key].items()}),
            'tops': figure3.peak_table(curves, ALPHAS)}


def test_one_changed_output_changes_figures_1_2_3(models):
    store, entries = models
    before = data_of(store, entries)
    run = next(e.run for e in entries if e.defense == 'ce' and e.seed == 0)
    log_probs = outputs_of(run)
    log_probs[0] = log_probs[0].roll(1) # an image of class 0
    store.save_tensors(run, 'log_probs.safetensors', {'test': log_probs, 'test_labels': LABELS})
    after = data_of(store, entries)
    for name, frame in after.items():
        assert frame.shape == before[name].shape and not frame.equals(before[name]), name
    unchanged = after['figure1'][after['figure1']['seed'] == 1]
    assert unchanged.equals(before['figure1'][before['figure1']['seed'] == 1])
    assert (after['figure3'][['nt', 'cmim']] == before['figure3'][['nt', 'cmim']]).all().all()


def test_a_deleted_model_is_left_out_of_figures_1_2_3(models):
    store, entries = models
    before = data_of(store, entries)
    store.set_aside(next(e.run for e in entries if e.defense == 'ce' and e.seed == 0))
    after = data_of(store, entries)
    left = before['figure1'][before['figure1']['seed'] == 1].reset_index(drop=True)
    assert after['figure1'].equals(left)
    assert after['tops'].set_index('defense')['n'].to_dict() == {'ce': 1, 'nt': 2, 'cmim': 2}
    for e in entries:
        if e.defense == 'nt': store.set_aside(e.run)
    gone = data_of(store, entries)
    for name in ('figure2', 'clusters', 'tops'): assert set(gone[name]['defense']) == {'ce', 'cmim'}, name
    assert list(gone['figure3']) == ['ce', 'cmim'] and np.allclose(gone['figure3']['cmim'], before['figure3']['cmim'])
    for e in entries: store.set_aside(e.run)
    assert model_outputs(entries, store) == {} and model_curves({}, ALPHAS) == {}
    assert figure3.peak_table({}, ALPHAS).empty


def drawn(study, store, entries):
    "What Figure 4 or 5 draws: the means joined, the single runs, the dashed line."
    stable = [e for e in entries if not (e.run.teacher and e.run.teacher.options.get('naive_exp'))]
    [picture] = sweep_pictures(stable, store, study).values()
    lines = picture.figure.axes[0].get_lines()
    means = next(line for line in lines if str(line.get_label()).startswith('mean of'))
    return dict(zip(means.get_xdata(), means.get_ydata(), strict=True)), sum(len(line.get_xdata()) for line in lines
                                                                             if line.get_marker() == '.')


def students(entries, study, value):
    return [e.run for e in entries if e.column == 'kd' and e.run.teacher.options[study.option] == value
            and not e.run.teacher.options['naive_exp']]


def test_sweeps_follow_the_store(study):
    study, store, entries = study
    low, high = study.values['smoke'][0], study.values['smoke'][-1]
    before, points = drawn(study, store, entries)
    assert set(before) == set(study.values['smoke']) and points == 3*len(before)
    run = students(entries, study, low)[0]
    old = store.result(run)['accuracy']
    change(store, run, accuracy=old + .03)
    after, _ = drawn(study, store, entries)
    assert after[low] == pytest.approx(before[low] + 1) and {**after, low: 0} == {**before, low: 0}
    store.set_aside(run)
    rest = [100*store.result(r)['accuracy'] for r in students(entries, study, low)[1:]]
    shorter, points = drawn(study, store, entries)
    assert shorter[low] == pytest.approx(np.mean(rest)) and points == 3*len(before) - 1
    for r in students(entries, study, high): store.set_aside(r)
    assert high not in drawn(study, store, entries)[0]
    summary = sweep_summary(sweep_frame(entries, store, study.option), study.option)
    assert summary.loc[(summary[study.option] == high) & ~summary['naive_exp'],
                       ['n', 'diverged']].to_numpy().tolist() == [[0, 0]]


def test_the_reference_line_follows_the_store(study):
    _, store, entries = study
    [(key, before)] = ls_reference(entries, store).items()
    for run in {e.run for e in entries if e.column == 'ls'}: change(store, run, accuracy=.25)
    assert ls_reference(entries, store) == {key: pytest.approx(25)} and before != pytest.approx(25)
    for run in {e.run for e in entries if e.column == 'ls'}: store.set_aside(run)
    assert ls_reference(entries, store) == {}


def test_teacher_columns_of_a_sweep_follow_the_store(study):
    study, store, entries = study
    run = students(entries, study, study.values['smoke'][0])[0].teacher
    def of(frame):
        same = (frame[study.option] == run.options[study.option]) & (frame['seed'] == run.seed)
        return frame.loc[same & ~frame['naive_exp']].iloc[0]
    before = of(sweep_frame(entries, store, study.option))
    store.save_tensors(run, 'log_probs.safetensors', {'test': outputs_of(run, 3.), 'test_labels': LABELS})
    change(store, run, accuracy=.111)
    after = of(sweep_frame(entries, store, study.option))
    assert after['teacher_accuracy'] == pytest.approx(11.1) and after['teacher_max_cmi'] > before['teacher_max_cmi']
    assert after['accuracy'] == before['accuracy']
    assert sweep_frame(entries, store, study.option,
                       'best')['accuracy'].mean() == pytest.approx(sweep_frame(entries, store,
                                                                               study.option)['accuracy'].mean() + 1)


def test_table10_counts_divergence_and_leaves_missing_runs_empty(tmp_path):
    store, entries = Store(tmp_path/'store'), table10.entries(profile('smoke'), '1, 25, 200', seeds=3)
    def is_lost(run): return run.method == 'cmim' and run.options['naive_exp'] and run.options['omega'] == 200
    for run in dict.fromkeys(e.run for e in entries):
        if is_lost(run): store.start(run); store.give_up(run, 'the loss is not finite', 1, {})
        elif not (run.teacher and is_lost(run.teacher)): write(store, run, .6 + .01*run.seed)
    def cells():
        return {row[0][-1]: row[1] for row in table10.draw(entries, store).rows}
    assert cells() == {'as printed': ('72.65', '72.53', 'NaN'),
                       'naive exponential': ('61.00 ± 1.00 (3)', '61.00 ± 1.00 (3)', 'NaN, 3 of 3 diverged'),
                       'logsumexp': ('61.00 ± 1.00 (3)',)*3}
    naive = [e.run for e in entries if e.column == 'kd' and e.run.teacher.options['naive_exp']
             and e.run.teacher.options['omega'] == 25]
    change(store, naive[2], accuracy=.71)
    assert cells()['naive exponential'][1].startswith('64.00')
    for run in naive: store.set_aside(run)
    assert cells()['naive exponential'][1] == ''
    store.set_aside(next(e.run.teacher for e in entries if e.run.teacher and is_lost(e.run.teacher)))
    assert cells()['naive exponential'][2] == 'NaN, 2 of 3 diverged'
    for e in entries: store.set_aside(e.run)
    assert {c for row, cells_ in cells().items() if row != 'as printed' for c in cells_} == {''}


def test_the_same_store_gives_the_same_files(models, tmp_path):
    store, entries = models
    def written(name):
        [picture] = figure3.draw(lambda powers: model_curves(model_outputs(entries, store), powers)).values()
        return [p.read_bytes() for p in save_picture(picture, 'a note', tmp_path/name/'figure3')]
    first, second = written('a'), written('b')
    assert first == second and len(first) == 4
