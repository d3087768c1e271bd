"""Tables 1 to 9 are functions of entries and store: change a number and they change, delete a run: its cell empties."""
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from inspect import signature

import pytest
import torch

from cmim_repro.core import keyed_generator
from cmim_repro.exhibits.table9 import timed_runs
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.store import Store
from cmim_repro.report.formats import Cell, to_csv, to_html, to_latex, to_markdown, to_text
from cmim_repro.report.models import table_accuracy
from cmim_repro.report.results import chosen, results_frame, student_entries, verdicts

SMALL = narrowed(profile('smoke'), seeds=3, attacks='kd dist', overrides='epsilons=0.1')
SPLITS = ('test', 'train')


@dataclass(frozen=True)
class Kind:
    "One table: its entries, how it is made, and in which cells an entry stands."
    entries: list
    make: object # (entries, store) -> Table
    places: object # entry -> [(labels, column)]


def picked(make, entries, store):
    frame = results_frame(entries, store)
    offered = {'frame': frame, 'picked': chosen(frame, 'paper'), 'judged': verdicts(frame)}
    return make(**{name: value for name, value in offered.items() if name in signature(make).parameters})


def kind(number, place, store=False, **asked):
    "A table of the paper, drawn from its lines or, with `store`, from entries and store."
    module = import_module(f'cmim_repro.exhibits.table{number}')
    return Kind(module.entries(SMALL, **asked), module.draw if store else partial(picked, module.draw), place)


def model_place(e): return [((e.data, e.teacher_model), e.defense)] if e.column == 'model' else []


def student_place(e): return [] if e.column == 'model' else [((e.defense, e.teacher_model, e.student_model), e.column)]


def entropy_place(e):
    return [((e.data, e.teacher_model, split, unit), e.defense) for split in SPLITS for unit in ('nats', 'bits')]


def spread_place(e):
    return [((*labels, row), column) for labels, column in student_place(e)
            for row in ('mean', 'standard deviation', 'variance')]


def paired_place(e):
    return [((e.data, e.teacher_model, e.student_model, 'LS' if e.column == 'ls' else 'DIST on CMIM'),
             f'seed {e.seed + 1}')]


TABLES = {
    '1': kind(1, student_place), 'models': Kind(student_entries(SMALL), partial(picked, table_accuracy), model_place),
    '2': kind(2, model_place), '3': kind(3, model_place), '4': kind(4, entropy_place, store=True),
    '5': kind(5, model_place),
    '6': kind(6, model_place), '7': kind(7, spread_place), '8': kind(8, paired_place, seeds=3),
    '9': kind(9, lambda e: [], store=True),
}
RUN_TABLES = [name for name in TABLES if name != '9']
TEACHER, STUDENT = SMALL.tasks[0].pairs[0]


def invent(store, run, shift=0):
    "Finish a run with numbers that depend on it and on `shift` alone."
    generator = keyed_generator('invented', run.id, shift)
    accuracy = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    store.start(run)
    if run.kind != 'attack':
        outputs = {split: torch.randn(6, 10, generator=generator).log_softmax(1) for split in SPLITS}
        store.save_tensors(run, 'log_probs.safetensors',
                           outputs | {f'{split}_labels': torch.arange(6) for split in SPLITS})
    found = dict(zip(('accuracy', 'best_accuracy', 'held_out_accuracy'), accuracy, strict=True))
    store.finish(run, found | {'seconds': 1., 'data': {'verified': True}})


def invent_times(store, factor=1.):
    for runs in timed_runs(TABLES['9'].entries).values():
        measured = {'seconds': {'ce': [2., 3.], 'cmim': [2.5*factor, 4.*factor]}, 'images': 100, 'epochs': 30,
                    'device': 'cpu', 'device_name': 'invented'}
        place = store.root/'timings'/('-'.join(r.id for r in runs.values()) + '-invented.json')
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(measured))
        yield place


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    for run in {e.run for kind in TABLES.values() for e in kind.entries}: invent(store, run)
    list(invent_times(store))
    return store


def texts(store): return {name: to_csv(kind.make(kind.entries, store)) for name, kind in TABLES.items()}


def cells(kind, store):
    "Labels and column of every cell of a table, and the cell."
    table = kind.make(kind.entries, store)
    rows = [row for row in table.rows if not isinstance(row, str)]
    return {(labels, column): cell for labels, line in rows for column, cell in zip(table.columns, line, strict=True)}


def used(kind): return {e.run for e in kind.entries if kind.places(e)}


def one(defense, column, seed=1):
    "The run of one entry of Table 1."
    return next(e.run for e in TABLES['1'].entries if (e.defense, e.column, e.seed) == (defense, column, seed))


CHANGED = {'CE model': one('ce', 'model'), 'CMIM model': one('cmim', 'model'), 'LS model': one('ls', 'model'),
           'ST model': one('st', 'model'),
           'LS student': one('cmim', 'ls'), 'KD student': one('nt', 'kd'), 'DIST student of CMIM': one('cmim', 'dist'),
           'student-sized CMIM': next(e.run for e in TABLES['5'].entries
                                      if (e.defense, e.teacher_model, e.seed) == ('cmim', STUDENT, 1))}


@pytest.mark.parametrize('who', CHANGED)
def test_changed_number_changes_every_table_that_uses_it_and_no_other(store, who):
    before = texts(store)
    invent(store, CHANGED[who], shift=1)
    after = texts(store)
    expected = {name for name in RUN_TABLES if CHANGED[who] in used(TABLES[name])}
    assert expected and {name for name in TABLES if before[name] != after[name]} == expected


def test_every_table_is_changed_by_some_run_above():
    assert {name for run in CHANGED.values() for name in RUN_TABLES if run in used(TABLES[name])} == set(RUN_TABLES)


def test_changed_measurement_changes_table_9_alone(store):
    before = texts(store)
    list(invent_times(store, factor=2))
    after = texts(store)
    assert [name for name in TABLES if before[name] != after[name]] == ['9']


def mean(cell): return cell.mean if isinstance(cell, Cell) else cell


DERIVED = {'best', 'gain', '95 % interval of the gain', 'mean'}


@pytest.mark.parametrize('name', RUN_TABLES)
def test_deleted_run_counts_no_more_and_without_runs_the_cell_is_empty(store, name):
    kind = TABLES[name]
    before = cells(kind, store)
    victim = next(e for e in reversed(kind.entries) if kind.places(e))
    twins = [e for e in kind.entries if kind.places(e) and set(kind.places(e)) & set(kind.places(victim))]
    touched = {place for e in kind.entries if e.run in {t.run for t in twins} for place in kind.places(e)}
    for left, e in reversed(list(enumerate(twins))):
        store.set_aside(e.run)
        now = cells(kind, store)
        for place in kind.places(victim): assert now[place].n == min(left, before[place].n)
    for place in touched:
        cell = now[place]
        assert (cell.mean, cell.sd, cell.n, cell.arrow, cell.verdict) == (None, None, 0, '', '')
    for place, cell in now.items():
        if place not in touched and place[1] not in DERIVED and place[0][-1] != 'difference':
            assert mean(cell) == mean(before[place]), place


@pytest.mark.parametrize('name', TABLES)
def test_empty_store_gives_a_table_of_empty_cells(tmp_path, name):
    kind = TABLES[name]
    table = kind.make(kind.entries, Store(tmp_path))
    found = [cell for row in table.rows if not isinstance(row, str) for cell in row[1]]
    assert found and all(cell.mean is None and cell.n == 0 if isinstance(cell, Cell) else not cell for cell in found)
    for write in (to_csv, to_html, to_latex, to_markdown, to_text): assert write(table)


def test_deleted_measurement_empties_table_9(store):
    kind = TABLES['9']
    assert all(cell.n == 2 for cell in cells(kind, store).values())
    for place in invent_times(store): place.unlink()
    assert all((cell.mean, cell.n) == (None, 0) for cell in cells(kind, store).values())


def test_gain_and_difference_lose_only_the_missing_seed(store):
    gain = ((SMALL.tasks[0].data, TEACHER), 'gain')
    assert cells(TABLES['5'], store)[gain].n == 3
    store.set_aside(one('ce', 'model', seed=2))
    assert cells(TABLES['5'], store)[gain].n == 2
    place = ((SMALL.tasks[0].data, TEACHER, STUDENT, 'difference'), 'seed 2')
    assert cells(TABLES['8'], store)[place].n == 1
    store.set_aside(one('cmim', 'ls', seed=1))
    assert cells(TABLES['8'], store)[place].mean is None


def ends_of_environments(tex):
    opened = []
    for kind, name in re.findall(r'\\(begin|end)\{(\w+)\}', tex):
        if kind == 'begin': opened.append(name)
        else: assert opened.pop() == name
    return opened


@pytest.mark.parametrize('name', TABLES)
def test_latex_is_well_formed(store, name):
    kind = TABLES[name]
    table = replace(kind.make(kind.entries, store), note='100 % of a_b & {c} for $1 #2 | `x ~ y^2` \\ < → ω² ± 3')
    tex = to_latex(table)
    assert tex.isascii() and ends_of_environments(tex) == []
    width = len(re.search(r'\\begin\{tabular\}\{([lr]+)\}', tex)[1])
    assert width == len(table.labels) + len(table.columns)
    rows = [line for line in tex.splitlines() if line.endswith('\\\\')]
    spans = [int(found[1]) for line in rows if (found := re.match(r'\\multicolumn\{(\d+)\}', line))]
    floats, sections = tex.count('\\begin{tabular}{l'), sum(isinstance(row, str) for row in table.rows)
    assert set(spans) <= {width} and sections <= len(spans) < sections + floats
    plain = [line for line in rows if not line.startswith('\\multicolumn')]
    assert len(plain) == floats + len(table.rows) - sections
    assert {len(re.split(r'(?<!\\)&', line)) for line in plain} == {width}
    unescaped = re.sub(r'\\[&%$#_{}]', '', tex)
    assert unescaped.count('{') == unescaped.count('}') and unescaped.count('$') % 2 == 0
    assert not re.search('[_#~]', unescaped)
    assert re.findall('.?%', unescaped) == ['%'] + ['{%']*floats # the comment with the packages, and a line end
    for rule in ('toprule', 'midrule', 'bottomrule'): assert f'\\{rule}' in tex
    assert r'\%' in tex and r'\textbar{}' in tex
