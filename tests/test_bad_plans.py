"""Every field of a plan is checked, with one sentence for each, before anything is computed or written."""
import json

import pytest

from cmim_repro.core import Invalid
from cmim_repro.experiments.execution import main
from cmim_repro.experiments.runs import Plan, make_run, run_from_dict
from cmim_repro.lab.training import Recipe

COMMON = {'recipe': Recipe(epochs=1, batch_size=32), 'data_options': {'per_class': 20}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
STUDENT = make_run('digits', 'cnn_tiny', 'kd', teacher=TEACHER, **COMMON)
GOOD = STUDENT.to_dict()
KINDS = (None, [], {}, '', 'text', True, -1, 1.5, [[]], {'a': {}}, '/../../../escaped/x')


def changed(field, value): return {**GOOD, field: value}


def within(field, name, value): return {**GOOD, field: {**GOOD[field], name: value}}


def sound(field, value):
    "Is it another plan, but one that can be computed?"
    return (field, value) in [('recipe', {}), ('data_options', {}), ('model_options', {})]


PLANS = [changed(field, value) for field in GOOD for value in KINDS if not sound(field, value)]
PLANS += [within('recipe', name, value) for name, value in [
    ('epochs', 0), ('epochs', '3'), ('epochs', 10**400), ('epochs', True), ('batch_size', 1), ('lr', 0), ('lr', float('nan')), ('lr', float('inf')), ('momentum', 1),
    ('nesterov', 'yes'), ('schedule', ['step']), ('milestones', 3), ('milestones', 'abc'), ('milestones', None), ('milestones', [0]), ('gamma', 2), ('step_epochs', 0),
    ('augment', 'mirror'), ('precision', 'fp8'), ('micro_batch', -1), ('processes', 0), ('evaluate_every', 0), ('fused', -1), ('micro_batch', 1), ('colour', 'red')]]
PLANS += [within('data_options', name, value) for name, value in [
    ('per_class', 0), ('per_class', 10**6), ('per_class', 'all'), ('per_class', [3]), ('held_out', 1), ('held_out', 'half'), ('held_out', -.1), ('split_seed', -1),
    ('split_seed', 'x'), ('classes', 1), ('classes', 99), ('classes', [0]), ('classes', 'zero'), ('classes', {}), ('test_per_class', 0), ('colour', 3)]]
PLANS += [within('model_options', name, value) for name, value in [('width', 0), ('width', 'a'), ('width', None), ('width', 10**9), ('width', 1.5), ('depth', 3)]]
PLANS += [within('options', name, value) for name, value in [
    ('weight', 'much'), ('weight', None), ('weight', [1]), ('temperature', 0), ('temperature', float('nan')), ('reduction', 'sum'), ('reduction', 3), ('heat', 1)]]
PLANS += [{**GOOD, 'options': {}}, {**GOOD, 'method': 'ce'}, {**GOOD, 'method': 'st', 'options': {'ratio': .1}, 'model': 'cnn_small'},
          {**GOOD, 'method': 'knockoff', 'options': {**make_run('digits', 'cnn_tiny', 'knockoff', teacher=TEACHER).options, 'budget': 1}},
          {**GOOD, 'method': 'mkd', 'options': {**make_run('digits', 'cnn_tiny', 'mkd', teacher=TEACHER).options, 'dimension': 10**9}},
          changed('teacher', {**TEACHER.to_dict(), 'seed': '/../../../escaped/x'}), changed('teacher', {**TEACHER.to_dict(), 'data_options': {'classes': 5}}),
          {name: value for name, value in GOOD.items() if name != 'seed'}]
TEXTS = ['', '{', 'null', '3', '"text"', '[3]', '[[]]', '[null]', '{}', '[{}]', '[' * 5000, '\ufeff[]', '{"teacher": ' * 2000 + '{}' + '}' * 2000]


def refused(folder, capsys, text):
    path = folder/'plan.json'
    path.write_text(text, encoding='utf-8')
    assert main([str(path), '--store', str(folder/'store'), '--device', 'cpu']) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ') and len(lines[0]) < 600, lines
    assert {path.name for path in folder.iterdir()} <= {'plan.json', 'store'} # nothing beside the store
    assert not list(folder.glob('store/*-*'))
    return lines[0]


def test_bad_fields_are_one_sentence_each(tmp_path, capsys):
    for plan in PLANS: refused(tmp_path, capsys, json.dumps([plan]))
    assert len(PLANS) > 130


def test_files_that_are_no_plan(tmp_path, capsys):
    for text in TEXTS: refused(tmp_path, capsys, text)
    path = tmp_path/'plan.json'
    path.write_bytes(b'\xff\xfe[]')
    assert main([str(path), '--store', str(tmp_path/'store')]) == 2 and 'is not JSON' in capsys.readouterr().err


def test_a_seed_never_leads_out_of_the_store(tmp_path, capsys):
    assert 'seed is ' in refused(tmp_path, capsys, json.dumps([changed('seed', '/../../../escaped/x')]))


def test_a_chain_of_too_many_teachers():
    description = TEACHER.to_dict()
    for _ in range(100): description = {**GOOD, 'teacher': description}
    with pytest.raises(Invalid, match='more than 64 teachers'): run_from_dict(description)


def test_what_is_sound_stays_what_it_was():
    assert run_from_dict(GOOD) == STUDENT and Plan.of([run_from_dict(GOOD)]).check().runs == (TEACHER, STUDENT)
