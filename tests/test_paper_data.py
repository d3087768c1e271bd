"""The committed transcription of the paper's tables: schema, names, number formats, and that the audit reads what is there."""
import re
import shutil

import pandas as pd
import pytest

from cmim_repro.core import Unusable
from cmim_repro.report import paper, paper_audit
from cmim_repro.report.paper import ATTACKS, DEFENSES, paper_folder, paper_table, printed, table7

COLUMNS = {
    1: 'row data_set defense teacher student attack value arrow', 2: 'data_set teacher defense value mark', 3: 'data_set teacher defense value mark',
    4: 'data_set teacher defense value', 5: 'data_set teacher defense value', 6: 'data_set teacher defense value',
    7: 'row first_label second_label third_label attack value spread', 8: 'data_set defense teacher student attack label seed value',
    9: 'data_set teacher defense value', 10: 'data_set defense teacher student omega value'}
CELLS = {1: 46 * 9, 2: 30, 3: 3, 4: 3, 5: 20, 6: 8, 7: 40 * 8, 8: 10, 9: 4, 10: 12}
DATA_SETS = {'cifar100', 'tinyimagenet', 'imagenet'}
NETWORKS = set('vgg11 vgg16 resnet18 resnet34 resnet50 resnet101 resnet152 shufflenetv2 mobilenetv2 mobilenet squeezenet resnext50 xception densenet121'.split())


def raw(number): return pd.read_csv(paper_folder()/f'table{number}.csv', dtype=str, keep_default_na=False)


@pytest.mark.parametrize('number', range(1, 11))
def test_columns_and_size(number):
    assert list(raw(number).columns) == COLUMNS[number].split()
    assert len(raw(number)) == CELLS[number]


@pytest.mark.parametrize('number', range(1, 11))
def test_no_cell_twice(number):
    assert not raw(number).drop(columns='value').drop(columns=['arrow', 'mark', 'spread'], errors='ignore').duplicated().any()


@pytest.mark.parametrize('number', range(1, 11))
def test_numbers_as_printed(number):
    form = {4: r'0\.\d{3}', 9: r'\d hours \d\d minutes', 10: r'\d\d\.\d\d|NaN'}.get(number, r'\d{1,2}\.\d\d')
    assert all(re.fullmatch(form, value) for value in raw(number)['value'])


@pytest.mark.parametrize('number', [n for n in range(1, 11) if n != 7])
def test_names(number):
    frame = paper_table(number)
    known = {'data_set': DATA_SETS, 'defense': {'ce', *DEFENSES}, 'teacher': NETWORKS, 'student': NETWORKS, 'attack': {'ls', *ATTACKS, 'best'}}
    for column in known.keys() & set(frame.columns): assert set(frame[column]) <= known[column]


def test_table1_rows_are_complete_and_in_order():
    frame = paper_table(1)
    assert frame['row'].tolist() == [row for row in range(1, 47) for _ in range(9)]
    assert frame['attack'].tolist() == ['ls', *ATTACKS, 'best'] * 46
    assert set(frame['arrow']) == {'up', 'down', ''}
    assert ((frame['arrow'] == '') == (frame['attack'] == 'ls')).all()
    assert frame.drop_duplicates('row').groupby('data_set').size().to_dict() == {'cifar100': 32, 'tinyimagenet': 10, 'imagenet': 4}


def test_table7_spreads_and_join():
    frame = table7()
    assert all(re.fullmatch(r'0\.\d\d', spread) for spread in raw(7)['spread'])
    assert set(frame['data_set']) == {'cifar100', 'tinyimagenet'}
    assert frame.groupby('row')['table1_row'].nunique().eq(1).all() and frame['agree'].between(7, 8).all()


# A sum per table notices a digit that was edited by accident; a wrong transcription that keeps it would have to be wrong twice.
@pytest.mark.parametrize('number, total', [(1, 28027.59), (2, 2153.67), (3, 220.3), (4, 0.318), (5, 1526.62), (6, 564.), (7, 21380.19), (8, 719.02), (10, 580.55)])
def test_totals(number, total):
    assert paper_table(number)['value'].sum() == pytest.approx(total, abs=1e-6)


def test_values_read_from_the_paper():
    assert printed(1, data_set='cifar100', defense='mad', teacher='vgg16', student='shufflenetv2', attack='dkd') == 7.64
    assert printed(1, data_set='imagenet', defense='cmim', teacher='resnet34', student='mobilenetv2', attack='knockoff') == 55.24
    assert printed(1, 'arrow', data_set='tinyimagenet', defense='nt', teacher='resnet34', student='resnet18', attack='avg') == 'up'
    assert printed(2, data_set='cifar100', defense='snt', teacher='vgg16') == 72.59
    assert printed(5, defense='cmim', teacher='xception') == 77.64
    assert printed(6, data_set='imagenet', defense='ce', teacher='resnet50') == 76.15
    assert printed(8, attack='ls', seed=4) == 72.25
    assert printed(9, teacher='resnet50', defense='cmim') == '5 hours 13 minutes'
    assert printed(10, omega=15) == 72.55


def test_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper._as_printed.cache_clear()
    assert len(paper._as_printed('table3')) == 3


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, 'paper_folder', lambda: tmp_path)
    paper._as_printed.cache_clear()
    with pytest.raises(Unusable, match=r'table3\.csv is missing'): paper._as_printed('table3')
    paper._as_printed.cache_clear()


def changed(column, value, **where):
    "`paper_table` with one cell of Table 1 replaced."
    def table(number):
        frame = paper_table(number)
        if number == 1:
            chosen = pd.concat([frame[k] == v for k, v in where.items()], axis=1).all(axis=1)
            assert chosen.sum() == 1
            frame.loc[chosen, column] = value
        return frame
    return table


def test_a_corrected_cell_removes_its_finding(monkeypatch):
    assert len(list(paper_audit.wrong_arrows())) == 5
    monkeypatch.setattr(paper_audit, 'paper_table', changed('arrow', 'up', row=27, attack='dkd'))
    assert len(list(paper_audit.wrong_arrows())) == 4


def test_a_wrong_cell_adds_a_finding(monkeypatch):
    monkeypatch.setattr(paper_audit, 'paper_table', changed('value', 99., row=46, attack='kd'))
    assert len(list(paper_audit.wrong_best())) == 2
    assert paper_audit.claims().loc['CMIM is undistillable (rows)', 'against'] == 1


# Every disagreement that the notes on the paper list: place and topic of its finding, and one printed value, or word of the text, without which it is another finding or none.
DISAGREEMENTS = {
    'arrow against its numbers': ('Table 1', 'arrows', 'table1', {'row': '7', 'attack': 'AVG'}, 'arrow', 'down'),
    'Best below the row maximum': ('Table 1', 'Best', 'table1', {'row': '17', 'attack': 'Best'}, 'value', '72.28'),
    'two LS accuracies': ('Table 1', 'LS student', 'table1', {'row': '41', 'attack': 'LS'}, 'value', '63.56'),
    'two LS accuracies, Table 7': ('Table 7', 'LS student', 'table7', {'row': '39', 'attack': 'LS'}, 'value', '63.56'),
    'shifted labels': ('Table 7', 'labels', 'table7', {'row': '4', 'attack': 'LS'}, 'first_label', 'MAD'),
    'missing rows': ('Table 7', 'rows', 'table7', {'row': '22'}, 'value', {'KD': '78.96', 'MKD': '79.02', 'DKD': '78.35', 'DIST': '78.31', 'HTC': '78.36', 'AVG': '78.81',
                                                                      'Knockoff': '72.87', 'LS': '78.76'}),
    'one other number': ('Table 7', 'values', 'table7', {'row': '7', 'attack': 'HTC'}, 'value', '71.36'),
    'variance or sd': ('Tables 7, 8', 'meaning of ±', 'table8', {'label': 'LS', 'seed': '5'}, 'value', '72.00'),
    'variance added to a mean': ('Table 7', 'added to a mean', 'settings', {'name': 'spread name'}, 'value', 'deviation'),
    'gaps within noise': ('Tables 1, 7', 'noise', 'table1', {'row': '29', 'attack': 'Best'}, 'value', '70.00'),
    'paired seeds': ('Tables 7, 8', 'paired seeds', 'table8', {'label': 'CMIM', 'seed': '1'}, 'value', '73.01'),
    'one model, two accuracies': ('Tables 2, 5', 'protected models', 'table5', {'teacher': 'RN50', 'defense': 'CMIM'}, 'value', '78.72'),
    'LS student above the model': ('Tables 1, 5', 'LS student above CMIM', 'table5', {'teacher': 'RN18', 'defense': 'CMIM'}, 'value', '79.20'),
    'highest accuracy': ('Table 2', 'highest accuracy', 'table2', {'teacher': 'VGG16', 'defense': 'CMIM'}, 'value', '74.84'),
    'second best': ('Table 2', 'second best', 'table2', {'teacher': 'VGG16', 'defense': 'APGP'}, 'mark', 'underline'),
    'gain above the stated': ('Tables 5, 6', 'gain', 'table5', {'teacher': 'SQN', 'defense': 'CMIM'}, 'value', '70.04'),
    'entropy without a unit': ('Table 4', 'entropy', 'table4', {'defense': 'LS'}, 'value', '0.424'),
    'time against Algorithm 1': ('Table 9', 'cost', 'table9', {'teacher': 'RN50', 'defense': 'CMIM'}, 'value', '6 hours 13 minutes'),
    'caption': ('Table 9', 'caption', 'settings', {'name': 'caption models'}, 'value', 'RN50 VGG16'),
    'range below noise': ('Table 10', 'range', 'table10', {'omega': '1'}, 'value', '73.65'),
    'two minima': ('Table 10', 'minimum', 'table10', {'omega': '25'}, 'value', '72.52'),
    'omega above the LS student': ('Tables 1, 10', 'above the LS student', 'table10', {'omega': '2'}, 'value', '72.60'),
    'overflow': ('Table 10', 'NaN', 'table10', {'omega': '40'}, 'value', '72.53'),
    'a fall called significant': ('Table 10, Figure 4', 'significant fall', 'table10', {'omega': '1'}, 'value', '70.65'),
    'a fall called negative': ('Table 10, Figure 5', 'sign of an effect', 'settings', {'name': 'effect of N'}, 'value', 'positive'),
    'settings of Table 1': ('Tables 1, 10', 'settings', 'table10', {'omega': '25'}, 'value', '72.54'),
    'defences described': ('Appendix G.1', 'defenses', 'settings', {'name': 'defenses', 'data_set': 'TinyImageNet'}, 'value', 'RSP NT ST LS CMIM'),
    'attacks described': ('Appendix G.2', 'attacks', 'settings', {'name': 'attacks', 'data_set': 'ImageNet'}, 'value', 'KD MKD DKD DIST HTC AVG Knockoff'),
    'lambda outside the grid': ('Appendix G', 'lambda', 'settings', {'name': 'grid'}, 'value', '0.1 0.2 0.5'),
    'abandoned parameters': ('Appendix G', 'parameters of CMIM', 'settings', {'name': 'CMIM parameters'}, 'value', 'T lambda beta omega N'),
    'decay of the learning rate': ('Text', 'learning rate decay', 'settings', {'name': 'learning rate decay', 'place': 'Appendix G'}, 'value', '0.2'),
    'T': ('Text', 'T', 'settings', {'name': 'T', 'place': 'Appendix G on CMIM'}, 'value', '200'),
    'repositories': ('Text', 'repository', 'settings', {'name': 'repository', 'place': 'Abstract'}, 'value', 'CMIM-605C'),
    'smoothing without a reference': ('Table 1, Appendix C', 'label smoothing', 'settings', {'name': 'smoothing and student'}, 'value', 'unknown'),
    'power of the simplex': ('Figure 2', 'power of Figure 2', 'settings', {'name': 'power of Figure 2'}, 'value', '0.25'),
    'gradient and power': ('Appendix J', 'gradient and power', 'settings', {'name': 'gradient and power'}, 'value', 'scaled')}


def forget_data():
    for cached in (paper._as_printed, paper._table, paper._table7_rows): cached.cache_clear()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    "A copy of the data, and a function that changes cells of it."
    folder = tmp_path/'paper'
    shutil.copytree(paper_folder(), folder)
    def edit(stem, where, column, value):
        frame = pd.read_csv(folder/f'{stem}.csv', dtype=str, keep_default_na=False)
        chosen = pd.concat([frame[k] == v for k, v in where.items()], axis=1).all(axis=1)
        assert chosen.any()
        frame.loc[chosen, column] = value if isinstance(value, str) else frame.loc[chosen, 'attack'].map(value)
        frame.to_csv(folder/f'{stem}.csv', index=False)
        monkeypatch.setattr(paper, 'paper_folder', lambda: folder)
        forget_data()
    yield edit
    monkeypatch.undo()
    forget_data()


@pytest.fixture(scope='module')
def as_printed():
    "Every check with its findings in the data as they are."
    forget_data()
    return {check: list(check()) for check in paper_audit.CHECKS}


def sentences(findings, place, topic): return [f.finding for f in findings if (f.place, f.topic) == (place, topic)]


@pytest.mark.parametrize('name', DISAGREEMENTS)
def test_each_disagreement_is_found_and_follows_the_data(as_printed, edited, name):
    place, topic, *change = DISAGREEMENTS[name]
    [check] = [check for check, findings in as_printed.items() if sentences(findings, place, topic)]
    edited(*change)
    assert sentences(check(), place, topic) != sentences(as_printed[check], place, topic)


def test_no_finding_is_without_a_case_above(as_printed):
    found = {(f.place, f.topic) for findings in as_printed.values() for f in findings}
    assert found == {(place, topic) for place, topic, *_ in DISAGREEMENTS.values()}


def test_every_finding_shows_what_it_was_computed_from(as_printed):
    assert all(f.numbers for findings in as_printed.values() for f in findings)


def test_a_corrected_cell_takes_its_finding_with_it(edited):
    edited('settings', {'name': 'gain'}, 'value', '1.32')
    assert not list(paper_audit.larger_gains())
    edited('table7', {'row': '7', 'attack': 'HTC'}, 'value', '71.36')
    assert not sentences(paper_audit.unequal_tables(), 'Table 7', 'values')
    edited('table10', {'omega': '25'}, 'value', '72.52')
    [found] = paper_audit.ablation_minimum()
    assert found.finding == 'The minimum 72.52 is at omega 20 and 25 and 30 (the text: 20 and 30), with nothing between.'
