"""Every notebook run_*.ipynb is an exhibit of one shape; and what single exhibits compute, on known numbers."""
import inspect
import json
import math
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cmim_repro.core import Invalid
from cmim_repro.exhibits import figure1, figure2, figure3, table1, table4, table7, table8, table9, table10
from cmim_repro.experiments.profiles import Entry, narrowed, profile, protected
from cmim_repro.experiments.store import Store
from cmim_repro.lab.models.core import model
from cmim_repro.report.exhibit import HOW, NARROWING, Exhibit, chosen_parameters, declared, read_parameters, repeat_command
from cmim_repro.report.formats import to_text
from cmim_repro.report.models import model_curves, model_outputs
from cmim_repro.report.page import exhibits
from cmim_repro.report.paper_audit import smoothed_entropy
from cmim_repro.report.results import chosen, provenance_note, results_frame, student_entries, verdicts
from cmim_repro.theory.cmi import class_cmi

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted(exhibits(ROOT/'nbs').values())
every_run = pytest.mark.parametrize('path', RUNS, ids=lambda path: path.stem)


def name_of(path): return path.stem.removeprefix('run_')
def module_of(path): return import_module(f'cmim_repro.exhibits.{name_of(path)}')


@every_run
def test_an_exhibit_has_one_shape(path):
    module, cells = module_of(path), json.loads(path.read_text())['cells']
    for function in ('entries', 'draw', 'answer'):
        assert callable(getattr(module, function)) and getattr(module, function).__doc__, function
    assert list(inspect.signature(module.entries).parameters)[0] == 'profile'
    first, source = ''.join(cells[0]['source']), [''.join(cell['source']) for cell in cells
                                                  if cell['cell_type'] == 'code']
    assert first.startswith('# ') and '**What the paper claims.**' in first
    assert f'papermill nbs/{path.name} OUT.ipynb' in first
    wanted = ['#| default_exp', "globals())", '.show(draw)', '.answer(answer)', '.provenance()']
    places = [next(i for i, text in enumerate(source) if word in text) for word in wanted]
    assert places == sorted(places) and places[-1] == len(source) - 1


@every_run
def test_papermill_finds_the_parameters_and_each_is_described(path):
    [cell] = [cell for cell in json.loads(path.read_text())['cells']
              if 'parameters' in cell['metadata'].get('tags', [])]
    assert all(' = ' in line and ' # ' in line for line in ''.join(cell['source']).splitlines())
    assert {'profile', 'store', 'figures', 'device', 'run_settings', 'plan_only', 'data_root',
            'allow_unverified'} <= set(declared(path))


COMMON = {}


@every_run
def test_a_parameter_has_one_default_everywhere(path):
    for name, default in declared(path).items(): assert COMMON.setdefault(name, default) == default, name


@every_run
def test_every_parameter_is_used(path):
    "By the exhibit itself, or by a function of its module that asks for it by name."
    module = module_of(path)
    asked = {name for f in vars(module).values() if inspect.isfunction(f) for name in inspect.signature(f).parameters}
    assert declared(path).keys() <= asked | {*HOW, *NARROWING, 'epochs', 'selection', 'protocol', 'margin'}


@every_run
def test_a_function_asks_only_for_what_there_is(path):
    exhibit = Exhibit.OFFERED
    for function in ('draw', 'answer'):
        for name, p in inspect.signature(getattr(module_of(path), function)).parameters.items():
            assert name in exhibit or name in declared(path) or p.default is not p.empty, (function, name)


OTHER = {bool: True, int: 7, str: 'other', float: .5}


@every_run
def test_the_command_names_every_parameter_that_chooses_what_is_shown(path):
    name, defaults = name_of(path), declared(path)
    plain = f'papermill nbs/{path.name} OUT.ipynb -p profile quick'
    assert repeat_command(name, chosen_parameters('quick', defaults, defaults)) == plain
    for key, default in defaults.items():
        other = OTHER[type(default)]
        command = repeat_command(name, chosen_parameters('quick', {**defaults, key: other}, defaults))
        assert command == (plain if key in HOW else f'{plain} -p {key} {other}')
        assert read_parameters(defaults,
                               dict(zip(shlex.split(command)[4::3], shlex.split(command)[5::3],
                                        strict=True)))['profile'] == 'quick'


@every_run
def test_unknown_parameters_and_unreadable_values_are_one_sentence(path):
    defaults = declared(path)
    with pytest.raises(Invalid, match="Unknown parameter 'sedes'; accepted: profile, data_root") as caught:
        read_parameters(defaults, {'sedes': 3})
    assert '\n' not in str(caught.value)
    for key, default in defaults.items():
        if isinstance(default, str): assert read_parameters(defaults, {key: 20261126})[key] == '20261126'
        else:
            with pytest.raises(Invalid, match=f"{key} is 'two'; it must be"): read_parameters(defaults, {key: 'two'})
        assert read_parameters(defaults, {key: None})[key] == default


@every_run
def test_a_plan_is_printed_and_nothing_is_written(path, tmp_path, capsys):
    exhibit = Exhibit(name_of(path), {'profile': 'smoke', 'store': str(tmp_path/'store'),
                                      'figures': str(tmp_path/'out'), 'plan_only': 'yes'})
    module = module_of(path)
    if hasattr(module, 'state'): exhibit.plan(module.entries, module.state)
    else: exhibit.run(module.entries)
    exhibit.show(module.draw)
    exhibit.answer(module.answer)
    exhibit.provenance()
    assert '» ' in capsys.readouterr().out and not (tmp_path/'out').exists()
    assert not list((tmp_path/'store').glob('*/result.json'))


@every_run
def test_without_a_finished_run_there_is_no_answer(path, tmp_path):
    exhibit, module = Exhibit(name_of(path), {'profile': 'smoke', 'store': str(tmp_path)}), module_of(path)
    exhibit.plan(module.entries, getattr(module, 'state', None))
    found = exhibit.give(module.answer)
    assert found.verdict == 'undecided' and found.because


# What single exhibits compute


def finish(store, run, accuracy, outputs=None):
    store.start(run)
    if outputs is not None:
        store.save_tensors(run, 'log_probs.safetensors',
                           {'test': outputs, 'test_labels': torch.arange(len(outputs)) % 10})
    source = {'seconds': 1., 'device_name': 'none', 'torch': '0', 'revision': 'none', 'data': {'verified': True}}
    store.finish(run, {'accuracy': accuracy, 'best_accuracy': accuracy + .01, 'held_out_accuracy': 1 - accuracy,
                       **source})


def picked(entries, store): return chosen(results_frame(entries, store), 'paper')


SMOKE = narrowed(profile('smoke'), seeds=3, overrides='epsilons=0.1 0.5')


@pytest.fixture
def store(tmp_path): return Store(tmp_path)


def test_names_of_networks_exist():
    for path in RUNS:
        for names in getattr(module_of(path), 'NETWORKS', {}).values(): assert set(names) <= set(model.names()), path


def test_table_1_marks_what_is_better_and_judges_each_row(store):
    entries = student_entries(narrowed(SMOKE, defenses='cmim', attacks='kd'), reference=False)
    level = {'model': .9, 'kd': .70, 'epsilon=0.1': .71, 'epsilon=0.5': .75}
    for e in entries: finish(store, e.run, level[e.choice or e.column] + .01*e.seed)
    def drawn():
        found = results_frame(entries, store)
        return table1.draw(chosen(found), verdicts(found))
    def kd(): return drawn().rows[1][1][1]
    assert (round(kd().mean, 6), kd().n, kd().arrow) == (71, 3, 'down')
    text = to_text(drawn())
    assert '72.00 ± 1.00 (3)' in text and provenance_note(entries, store,
                                                          'an example').startswith('Made by `an example` from ')
    for e in entries:
        if e.column == 'kd': store.set_aside(e.run)
    assert (kd().mean, kd().n, kd().arrow) == (None, 0, '')


@pytest.mark.parametrize('cmim, others, verdict',
                         [((-1., -1.2, -1.1), (1., 1.2, 1.1), 'agrees'), ((1., 1.2, 1.1), (1., 1.2, 1.1), 'disagrees'),
                                                   ((-1., -1.2, -1.1), (1., -1.2, .3), 'undecided'),
                                                   ((-1., -1.2, -1.1), (-1., -1.2, -1.1), 'disagrees')])
def test_the_answer_of_table_1(store, cmim, others, verdict):
    entries = student_entries(narrowed(SMOKE, defenses='cmim, st', attacks='kd', overrides='epsilons=0.1'))
    for e in entries:
        gains = {'cmim': cmim, 'st': others, 'ce': (0., 0., 0.)}[e.defense]
        finish(store, e.run, .7 + .01*e.seed + (gains[e.seed]/100 if e.column == 'kd' else 0))
    assert table1.answer(verdicts(results_frame(entries, store))).verdict == verdict


def test_table_4_knows_the_entropy_of_invented_outputs(store):
    entries = table4.entries(SMOKE)
    for e in entries:
        finish(store, e.run, .9, torch.full((4, 10), .01*(e.seed + 1)).fill_diagonal_(1 - .09*(e.seed + 1)).log())
    table = table4.draw(entries, store)
    known = [-(1 - .09*k)*math.log(1 - .09*k) - .09*k*math.log(.01*k) for k in (1, 2, 3)]
    assert table.rows[0][1][0].mean == pytest.approx(np.mean(known), abs=1e-6)
    assert table.rows[1][1][0].mean == pytest.approx(np.mean(known)/math.log(2), abs=1e-6)
    assert [(c.mean, c.n) for c in table.rows[2][1]] == [(None, 0)]*3
    assert table.rows[-2][1] == (None, None, f'{smoothed_entropy(.05, 10):.3f}')
    assert table4.answer(entries, store).verdict == 'undecided' # all alike


@pytest.mark.parametrize('noise, verdict',
                         [({'ce': 1., 'cmim': 2., 'ls': 3.}, 'agrees'),
                          ({'ce': 2., 'cmim': 1., 'ls': 3.}, 'disagrees')])
def test_the_answer_of_table_4(store, noise, verdict):
    entries, generator = table4.entries(SMOKE), torch.Generator().manual_seed(0)
    for e in entries:
        sharp = (8. - 2*noise[e.defense])*(1 + .01*torch.rand((), generator=generator))
        finish(store, e.run, .9, (sharp*torch.eye(10)).log_softmax(-1))
    assert table4.answer(entries, store).verdict == verdict


def test_table_7_has_mean_deviation_and_variance(store):
    entries = table7.entries(SMOKE, defenses='cmim', attacks='kd dist')
    for e in entries: finish(store, e.run, (.7 if e.column == 'ls' else .6) + [0, .01, .05][e.seed])
    lines = picked(entries, store)
    _, *rows = table7.draw(lines).rows
    assert [rows[i][1][1].mean for i in range(3)] == pytest.approx([62, math.sqrt(7), 7])
    known = table7._printed_row(('cifar100', 'cmim', 'vgg16', 'vgg11'))
    assert (known['value']['kd'], known['spread']['ls']) == (71.87, .09)
    said = table7.answer(lines)
    assert said.verdict == 'undecided' and said.because.startswith('Over 3 cells')
    assert 'deviation is 2.65 points' in said.because
    assert table7.answer(lines[lines['seed'] == 0]).because == 'No cell has two finished runs yet.'


@pytest.mark.parametrize('scale, verdict', [(1., 'disagrees'), (None, 'agrees')])
def test_the_answer_of_table_7_where_the_paper_prints_the_cells(scale, verdict):
    "Runs whose standard deviation, or whose variance, is the printed number."
    lines = []
    for attack, line in table7._printed_row(('cifar100', 'cmim', 'vgg16', 'vgg11')).iterrows():
        sd = line['spread'] if scale else math.sqrt(line['spread'])
        place = {'data': 'cifar100', 'defense': 'cmim', 'teacher': 'vgg16', 'student': 'vgg11', 'column': attack}
        lines += [{**place, 'seed': s, 'accuracy': line['value'] + sd*(s - 1)} for s in range(3)]
    assert table7.answer(pd.DataFrame(lines)).verdict == verdict


def test_table_8_pairs_seeds_and_tests_the_papers_own(store):
    entries = table8.entries(SMOKE, seeds=3)
    for e in entries: finish(store, e.run, .7 + .02*e.seed - (.01 + .001*e.seed)*(e.column == 'dist'))
    lines = results_frame(entries, store)
    ls, dist, difference = (cells for _, cells in table8.draw(chosen(lines, 'paper')).rows)
    assert [c.mean for c in difference] == pytest.approx([-1, -1.1, -1.2, -1.1])
    assert (ls[-1].n, dist[-1].n, difference[-1].n) == (3, 3, 3)
    assert table8._printed_runs(('cifar100', 'cmim', 'resnet50', 'vgg11'), 'dist')[0] == 72.01
    tests = table8.paired_tests(lines).set_index('numbers')
    assert tests.loc['ours', 'mean'] == pytest.approx(-1.1)
    printed = tests.loc['printed']
    assert (round(printed['mean'], 3), round(printed['t'], 1), printed['n'], printed['verdict']) == (-.176, -4.7, 5,
                                                                                                     'undistillable')
    said = table8.answer(lines, chosen(lines, 'paper'))
    assert said.verdict == 'agrees' and 'below zero for 3 of 3 seeds, mean -1.10 points' in said.because


def test_table_8_has_the_papers_pair_unless_others_are_asked_for():
    assert {(e.teacher_model, e.student_model) for e in table8.entries(profile('paper'))} == {('resnet50', 'vgg11')}
    assert {(e.teacher_model, e.student_model)
            for e in table8.entries(profile('paper'), networks='vgg16:vgg11', seeds=1)} == {('vgg16', 'vgg11')}
    assert {e.data for e in table7.entries(profile('paper'))} == {'cifar100', 'tinyimagenet'}


def test_table_9_follows_its_measurements(store):
    entries = table9.entries(SMOKE)
    [runs] = table9.timed_runs(entries).values()
    place = store.root/'timings'/f"{runs['ce'].id}-{runs['cmim'].id}-invented.json"
    place.parent.mkdir()
    measured = {'seconds': {'ce': [2., 4.], 'cmim': [3., 4.]}, 'images': 200, 'epochs': 60,
                'device_name': 'an invented device', 'device': 'cpu'}
    place.write_text(json.dumps(measured))
    assert [c.mean for c in table9.draw(entries, store).rows[0][1]] == pytest.approx([3, 3.5, 1.25, 3, 3.5, 75,
                                                                                      (200/3 + 50)/2])
    said = table9.answer(entries, store)
    assert said.verdict == 'undecided' and '+25.0% against CE on an invented device' in said.because
    place.write_text(json.dumps({**measured, 'seconds': {'ce': [2., 4.], 'cmim': [2.4, 4.9]}}))
    assert table9.answer(entries, store).verdict == 'agrees'
    place.unlink()
    assert [(c.mean, c.n) for c in table9.draw(entries, store).rows[0][1]] == [(None, 0)]*7
    assert table9.answer(entries, store).because == 'Nothing has been measured yet.'
    assert table9.time_note(entries, store, 'x') == 'x: nothing measured yet.'


def test_values_of_the_ablations_are_the_papers():
    from cmim_repro.exhibits import figure4, figure5
    from cmim_repro.report.paper import paper_setting, paper_table
    assert list(table10.STUDY.values['paper']) == paper_table(10)['omega'].tolist()
    for name, option in (('ablation beta', 'beta'), ('ablation N', 'count')):
        assert {*paper_setting(name)} == {table10.STUDY.fixed[option]}
    for study in (figure4.STUDY, figure5.STUDY, table10.STUDY):
        for tried in study.values.values():
            assert list(tried) == sorted(set(tried)) and set(tried) <= set(study.values['paper'])


@pytest.mark.parametrize('best, lost, verdict',
                         [(25, True, 'agrees'), (25, False, 'disagrees'), (1, True, 'disagrees')])
def test_the_answer_of_table_10(store, best, lost, verdict):
    entries = table10.entries(profile('smoke'), '1, 25, 200', seeds=3)
    def gone(run): return lost and run.options.get('naive_exp') and run.options['omega'] == 200
    outputs = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for e in entries:
        teacher = e.run.teacher or e.run
        if gone(e.run): store.start(e.run); store.give_up(e.run, 'the loss is not finite', 1, {})
        elif not gone(teacher):
            omega = teacher.options.get('omega', 0)
            finish(store, e.run, .7 + .001*math.sin((e.seed + 1)*omega) - .05*(omega == best), outputs)
    assert table10.answer(entries, store).verdict == verdict


LABELS = torch.arange(400) % 10


@pytest.fixture
def outputs(store):
    "Gaussian logits, more alike for CMIM than for CE."
    generator, task = torch.Generator().manual_seed(0), profile('smoke').tasks[0]
    entries = [Entry('digits', d, 'cnn_small', '', 'model', '', seed, protected(task, d, 'cnn_small', seed))
               for d in ('ce', 'cmim') for seed in range(3)]
    for e in entries:
        logits = {'ce': 2., 'cmim': .5}[e.defense]*torch.randn(400, 10, generator=generator) + 6*torch.eye(10)[LABELS]
        finish(store, e.run, .9, logits.log_softmax(-1))
    return entries, model_outputs(entries, store)


def test_figure_1_finds_the_maximum_where_the_derivative_is_zero(outputs):
    alphas, (log_probs, labels) = torch.linspace(0, 4, 41), outputs[1]['digits', 'cnn_small']['ce'][0]
    values, slopes = figure1.class_curves(log_probs, labels, [1, 5, 7], alphas)
    direct = np.stack([[float(class_cmi(log_probs, labels, float(a))[y]) for a in alphas] for y in (1, 5, 7)])
    np.testing.assert_allclose(values, direct, atol=1e-9)
    above, below = (figure1.class_curves(log_probs, labels, [1, 5, 7], alphas[1:].double() + h)[0]
                    for h in (1e-4, -1e-4))
    np.testing.assert_allclose((above - below)/2e-4, slopes[:, 1:], atol=1e-6)
    peaks = figure1.maximising_powers(log_probs, labels, [1, 5, 7])
    inside = peaks['alpha'] < 4
    assert inside.any() and (peaks['derivative'][inside].abs() < 1e-9).all()
    assert (peaks['derivative'][~inside] > 0).all()
    assert (peaks['cmi'].to_numpy() > values.max(1) - 1e-12).all()
    ends = figure1.maximising_powers(log_probs, labels, [1, 5, 7], high=.2)
    assert (ends['alpha'] == .2).all() and (ends['derivative'] > 0).all()


def test_figure_1_takes_the_papers_classes_where_there_are_such(outputs):
    one = outputs[1]['digits', 'cnn_small']['ce'][0]
    found, heights = figure1.three_classes(*one), figure1.maximising_powers(*one, range(10))['cmi']
    assert [found[0], found[-1]] == [int(heights.argmax()), int(heights.argmin())]
    names = ['orchid', 'a', 'beaver', 'motorcycle', *'bcdefg']
    assert figure1.three_classes(*one, class_names=names) == [2, 0, 3]
    assert figure1.three_classes(*one, '4, a, 0', names) == [4, 1, 0]
    with pytest.raises(Invalid, match="Unknown class 'cow'"):
        figure1.three_classes(*one, 'cow, 1, 2', list('abcdefghij'))
    frame = figure1.class_frame({0: one, 1: one}, [1, 5], [0., 1., 2.], list('abcdefghij'))
    assert (len(frame), frame['class'].unique().tolist()) == (2*2*3, ['b', 'f'])


class Digits: class_names = list('abcdefghij')


def test_figures_1_to_3_answer(outputs, store):
    entries, _ = outputs
    found = figure1.answer([e for e in entries if e.defense == 'ce'], store, lambda run: Digits)
    assert found.verdict in ('agrees', 'disagrees', 'undecided') and 'maxima (classes times seeds)' in found.because
    assert figure2.answer(entries, store,
                          lambda run: Digits).because.startswith('cnn_small, CMIM - CE at power 4: spread -')
    def cmi_at(powers): return model_curves(outputs[1], powers)
    found = figure3.answer(entries, store, cmi_at)
    assert found.verdict == 'agrees' and 'surely lower than 1 of 1 others (n = 3)' in found.because
    alone = [e for e in entries if e.defense == 'ce']
    def of_ce(powers): return model_curves(model_outputs(alone, store), powers)
    assert figure3.answer(alone, store, of_ce).verdict == 'undecided'


def test_figure_2_measures_spread_and_distance(outputs):
    one = pd.DataFrame({'defense': 'm', 'alpha': 1., 'corner': [0, 0, 1, 1], 'x': [0, .2, 1., 1.], 'y': [0, 0, 0, 0.]})
    assert figure2.cluster_frame(one)[['spread', 'off_corner']].to_numpy()[0] == pytest.approx([.05, .05])
    models = {d: seeds[0] for d, seeds in outputs[1]['digits', 'cnn_small'].items()}
    spread = figure2.cluster_frame(figure2.simplex_frame(models, [1, 5, 7])).pivot(index='defense', columns='alpha',
                                                                                   values='spread')
    assert (spread.loc['cmim'] < spread.loc['ce']).all()


def test_figure_3_lists_the_largest(outputs):
    alphas = torch.linspace(0, 4, 41).tolist()
    curves = model_curves(outputs[1], alphas)
    peaks = figure3.peak_table(curves, alphas)
    assert peaks['max CMI'].idxmax() == 0
    assert peaks.loc[0, 'max CMI'] == pytest.approx(np.mean([v.max() for v in curves['digits', 'cnn_small']['ce']]))


@pytest.mark.parametrize('given, words', [({'simplex_classes': 'one, two, cat'}, "Unknown class 'cat'"), ({'simplex_classes': 'one'}, 'give three names'),
                                          ({'figures': '/proc/nowhere'}, 'cannot be written')])
def test_what_the_end_needs_is_checked_before_the_first_step(tmp_path, given, words):
    asked = {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'figures'), 'seeds': '1', 'attacks': 'kd', 'defenses': 'ls', **given}
    with pytest.raises(Invalid, match=words): Exhibit('table1', asked).run(table1.entries)
    assert not list((tmp_path/'store').glob('*-*'))
