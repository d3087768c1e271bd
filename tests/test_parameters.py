"""Parameters are read by kind, in any spelling, and whatever makes no sense is one sentence before anything is computed."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cmim_repro.core import Invalid
from cmim_repro.exhibits import table1
from cmim_repro.experiments.cost import main as cost
from cmim_repro.experiments.execution import execute, main, read_settings
from cmim_repro.experiments.profiles import names, parse_overrides, profile, read_seeds, read_spec
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.workers import execute_in_processes
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.exhibit import OR_NAMES, Exhibit, declared, notebook_of, read_parameters

DEFAULTS = declared(notebook_of('table1'))
COMMON = {'recipe': Recipe(epochs=1, batch_size=32), 'data_options': {'per_class': 20}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)


def asked(folder, **given):
    with contextlib.redirect_stdout(io.StringIO()):
        exhibit = Exhibit('table1', {'profile': 'smoke', 'store': str(folder/'store'), 'figures': str(folder/'figures'), 'plan_only': 'True', 'seeds': '1', **given})
        exhibit.run(table1.entries)
    return exhibit


@pytest.mark.parametrize('name', [name for name, value in DEFAULTS.items() if isinstance(value, bool) and name not in OR_NAMES])
def test_switches_are_read_in_any_spelling(name):
    for value in (False, 'false', 'False', 'no', 'off', '0', 0): assert read_parameters(DEFAULTS, {name: value})[name] is False
    for value in (True, 'true', 'TRUE', 'yes', 'on', '1', 1): assert read_parameters(DEFAULTS, {name: value})[name] is True
    for value in (None, 'None', 'null', '~', ''): assert read_parameters(DEFAULTS, {name: value})[name] is DEFAULTS[name]
    for value in ('maybe', 2, -1, .5):
        with pytest.raises(Invalid, match=name): read_parameters(DEFAULTS, {name: value})


def test_texts_and_folders():
    read = lambda **given: read_parameters(DEFAULTS, given)
    assert read(store=20261126)['store'] == '20261126' and read(store='~/runs')['store'] == os.path.expanduser('~/runs')
    assert read(device=None)['device'] == read(device='None')['device'] == 'auto' and read(workers=None)['workers'] == -1
    assert read(data_root='/data/my images, mine')['data_root'] == '/data/my images, mine'
    with pytest.raises(Invalid, match='workers is .two.; it must be a whole number'): read(workers='two')
    with pytest.raises(Invalid, match='without zeros'): read(store='a\0b')


def test_quotes_hold_together_and_make_texts():
    assert names('a, "b c,d" e') == ['a', 'b c,d', 'e'] and names("it's") == ["it's"]
    path = 'folder:/data/my images'
    assert parse_overrides(f'knockoff.transfer={path}, epochs=3') == {'knockoff.transfer': path, 'epochs': 3}
    assert parse_overrides(f'knockoff.transfer="{path}, mine", a="7"') == {'knockoff.transfer': f'{path}, mine', 'a': '7'}
    assert read_spec(f'knockoff:transfer={path}:budget=30') == ('knockoff', {'transfer': path, 'budget': 30})
    assert names(f'kd, "knockoff:transfer={path}"') == ['kd', f'knockoff:transfer={path}']
    assert read_parameters(DEFAULTS, {'attacks': ['kd', f'knockoff:transfer={path}']})['attacks'] == f'kd, "knockoff:transfer={path}"'
    assert parse_overrides('a=true, b=FALSE, c=null, d=~, e=none, f=1 2') == {'a': True, 'b': False, 'c': None, 'd': None, 'e': 'none', 'f': [1, 2]}


@pytest.mark.parametrize('given', [
    {'overrides': 'mkd.dimension=1000000000'}, {'overrides': 'per_class=0'}, {'overrides': 'held_out=1'}, {'overrides': 'cmim.weight=~'}, {'overrides': 'classes=1'},
    {'overrides': 'epochs'}, {'overrides': 'knockoff.transfer=5'}, {'seeds': '1000000'}, {'seeds': '[1,1]'}, {'attacks': 'kd:weight'}, {'networks': 'a:b:c'},
    {'run_settings': 'threads=-1'}, {'run_settings': 'compile=maybe'}, {'executor': 'ftp://x'}, {'device': 'gpu'}, {'margin': 'nan'}, {'workers': '-2'}], ids=str)
def test_nonsense_is_one_sentence_in_the_plan(tmp_path, given):
    with pytest.raises(Invalid) as said: asked(tmp_path, **given)
    assert '\n' not in str(said.value) and not list((tmp_path/'store').glob('*-*'))


def test_a_transfer_folder_with_blanks_and_commas(tmp_path):
    folder = tmp_path/'my images, mine'
    folder.mkdir()
    for i in range(40): Image.new('L', (8, 8), 6*i).save(folder/f'{i:02}.png')
    changes = parse_overrides(f'knockoff.transfer="folder:{folder}"')
    run = make_run('digits', 'cnn_tiny', 'knockoff', teacher=TEACHER, transfer=changes['knockoff.transfer'], **COMMON)
    store = Store(tmp_path/'store')
    assert execute(Plan.of([run]), store, Settings(device='cpu')) == [] and store.finished(run)


def test_a_store_whose_name_begins_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[1]))
    store = Store('-runs')
    assert execute_in_processes(Plan.of([TEACHER]), store, 1, Settings(device='cpu'), pause=.2) == [] and store.finished(TEACHER)


@pytest.mark.parametrize('arguments', [['--limit', '-1'], ['--limit', '0'], ['--settings', 'threads=two'], ['--device', 'gpu']], ids=str)
def test_the_worker_refuses_nonsense(tmp_path, capsys, arguments):
    (tmp_path/'plan.json').write_text(json.dumps([TEACHER.to_dict()]), encoding='utf-8')
    assert main([str(tmp_path/'plan.json'), '--store', str(tmp_path/'store'), '--device', 'cpu', *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ')


@pytest.mark.parametrize('option', ['threads', 'steps', 'blocks', 'batch-size', 'image-size', 'num-classes', 'num-samples'])
@pytest.mark.parametrize('value', ['0', '-1'])
def test_the_cost_of_nothing_is_refused(capsys, option, value):
    assert cost([f'--{option}', value, '--networks', 'cnn_tiny']) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ')


def test_a_million_seeds_are_refused_at_once():
    with pytest.raises(Invalid, match='up to 1000'): read_seeds('1000000')
    with pytest.raises(Invalid, match='at most 1000'): read_seeds(list(range(2000)))
    for text in ('[1', '1]', '(1, 2', '[1, 2))'):
        with pytest.raises(Invalid, match='seeds is'): read_seeds(text)
    assert read_seeds('[3, 5]') == (3, 5) and read_seeds(4) == 4 and profile('smoke').seeds == 2
    assert read_settings('cpu', 'compile=false').compile is False


class Estimated:
    def _repr_html_(self): return ''


@pytest.mark.parametrize('given, words', [
    ({'workers': 'two'}, 'workers is .two.; it must be a whole number'), ({'attacks': 'nonsense'}, "Unknown attack 'nonsense'"),
    ({'overrides': 'mkd.dimension=1000000000'}, 'dimension'),
    ({'data_sets': 'cifar100', 'data_root': '{folder}'}, 'has no train and no test and no meta'), ({'data_sets': 'tinyimagenet', 'data_root': '{folder}'}, 'has no wnids.txt'),
    ({'data_sets': 'imagenet', 'data_root': '{folder}'}, 'has no folder train'),
    ({'attacks': 'knockoff:transfer=folder:{folder}/away'}, 'away is not a folder'), ({'attacks': 'knockoff:transfer=cifar100', 'data_root': '{folder}'}, 'has no train')], ids=str)
def test_parameters_and_files_are_refused_before_anything_is_estimated(tmp_path, monkeypatch, given, words):
    "Where the plan alone is wanted, files are not."
    started = []
    monkeypatch.setattr('cmim_repro.report.exhibit.estimate', lambda *given: started.append(given) or Estimated())
    given = {name: value.format(folder=tmp_path) for name, value in given.items()}
    folders = {'profile': 'smoke', 'seeds': '1', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'figures')}
    with pytest.raises(Invalid, match=words): Exhibit('table1', {**folders, **given}).run(table1.entries)
    assert not started and not list((tmp_path/'store').glob('*-*'))
    if 'folder' in str(given) or 'data_root' in given:
        Exhibit('table1', {**folders, **given, 'plan_only': True}).run(table1.entries)
        assert started


@pytest.mark.parametrize('given, words', [({'attacks': 'nonsense'}, "Unknown attack 'nonsense'"), ({'data_sets': 'cifar100'}, 'has no train and no test and no meta')], ids=str)
def test_the_command_refuses_in_one_line_and_leaves_no_process(tmp_path, given, words):
    folders = {'seeds': '1', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'figures'/'smoke'), 'data_root': str(tmp_path)}
    command = [sys.executable, '-m', 'cmim_repro.report.page', 'table1', '--profile', 'smoke', '--figures', str(tmp_path/'figures')]
    for item in {**folders, **given}.items(): command += ['-p', *item]
    # a process that were left would hold the pipe, and this would wait for it
    done = subprocess.run(command, capture_output=True, encoding='utf-8', timeout=120)
    [line] = done.stdout.splitlines()
    assert done.returncode == 1 and re.match(f'table1: failed: .*{words}', line) and not done.stderr
    mark = tmp_path/'figures'/'executed'/'smoke'/'run_table1.failed'
    assert mark.read_text(encoding='utf-8') == line.removeprefix('table1: failed: ') + '\n' and not list((tmp_path/'store').glob('*-*'))
