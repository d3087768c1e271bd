"""The committed transcription of the paper's tables: schema, names, number formats, and that the audit reads what is there."""
import re

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
