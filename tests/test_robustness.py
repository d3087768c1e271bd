"""What goes wrong outside the program: one clear sentence, an exit code above zero, and nothing finished is lost."""
import json
import resource
import subprocess
import sys

import pytest
from PIL import Image

from cmim_repro.core import Invalid
from cmim_repro.experiments.execution import execute, main
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.workers import execute_in_processes
from cmim_repro.lab.training import Recipe

COMMON = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 20}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
STUDENT = make_run('digits', 'cnn_tiny', 'kd', teacher=TEACHER, **COMMON)


def plan_file(folder, *runs):
    path = folder/'plan.json'
    path.write_text(json.dumps([run.to_dict() for run in runs]))
    return str(path)


def command(folder, *runs):
    return [plan_file(folder, *runs), '--store', str(folder/'store'), '--device', 'cpu', '--settings',
            'checkpoint_seconds=0']


def error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    return lines[0]


def finished(folder): return {p: p.read_bytes() for p in (folder/'store').glob('*/*') if p.suffix != '.lock'}


@pytest.fixture
def with_teacher(tmp_path):
    assert main(command(tmp_path, TEACHER)) == 0
    return tmp_path


@pytest.mark.parametrize('file, words', [('result.json', 'result.json is damaged (not JSON)'),
                                         ('weights.safetensors', 'weights.safetensors is damaged')])
def test_a_damaged_teacher_stops_its_student(with_teacher, capsys, file, words):
    path = Store(with_teacher/'store').folder(TEACHER)/file
    path.write_bytes(path.read_bytes()[:20])
    before = finished(with_teacher)
    assert main(command(with_teacher, STUDENT)) == 2
    assert words in error(capsys)
    assert all(before[p] == p.read_bytes() for p in before)


def test_a_damaged_checkpoint_is_set_aside(with_teacher):
    folder = Store(with_teacher/'store').start(STUDENT)
    (folder/'checkpoint.pt').write_bytes(b'PK\x03\x04 cut off')
    with pytest.warns(UserWarning, match='checkpoint.pt was damaged .*checkpoint.pt.damaged-1'):
        assert main(command(with_teacher, STUDENT)) == 0
    assert (folder/'checkpoint.pt.damaged-1').read_bytes() == b'PK\x03\x04 cut off' # nothing is deleted


@pytest.mark.parametrize('change, words', [
    ({'method': 'kdd'}, "Unknown method 'kdd'; accepted: "),
                                           ({'model': 'vgg12'}, "Unknown network 'vgg12'; accepted: "),
    ({'options': {**STUDENT.options, 'temperature': 0}}, 'temperature is 0; it must be a number above 0'),
    ({'colour': 'red'}, "Unknown key of a run 'colour'"), ({'recipe': {'epochs': 0}}, 'epochs is 0; it must be a '
                                                                                      'whole number from 1')])
def test_a_plan_with_bad_values_trains_nothing(tmp_path, capsys, change, words):
    (tmp_path/'plan.json').write_text(json.dumps([{**STUDENT.to_dict(), **change}]))
    assert main([str(tmp_path/'plan.json'), '--store', str(tmp_path/'store')]) == 2
    assert words in error(capsys)
    assert not list((tmp_path/'store').glob('*-*'))


@pytest.mark.parametrize('weight', [-1, float('nan'), 'much'])
def test_out_of_range_options_of_cmim(weight):
    for option in ('weight', 'omega', 'beta', 'count'):
        with pytest.raises(Invalid, match='it must be|must be a number') as found:
            Plan.of([make_run('digits', 'cnn_tiny', 'cmim', **{option: weight}, **COMMON)]).check()
        assert '\n' not in str(found.value)


def test_a_store_that_cannot_be_written(tmp_path, capsys):
    assert main([plan_file(tmp_path, TEACHER), '--store', '/proc/nowhere']) == 2
    assert 'The store /proc/nowhere cannot be written' in error(capsys)


def test_a_full_disk_keeps_what_is_finished(with_teacher):
    "A limit on the size of files stands for a full disk: writing fails with an error of the operating system."
    before, plan = finished(with_teacher), command(with_teacher, STUDENT)
    child = subprocess.run([sys.executable, '-m', 'cmim_repro.experiments.execution', *plan], capture_output=True,
                           text=True,
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert child.returncode == 2 and 'cannot be written' in child.stderr and 'Traceback' not in child.stderr
    assert all(before[p] == p.read_bytes() for p in before)
    assert main(plan) == 0


def test_a_diverged_run_is_noted_and_the_others_finish(tmp_path, capsys, monkeypatch):
    wild = make_run('digits', 'cnn_tiny', 'ce', recipe=Recipe(epochs=2, batch_size=32, lr=1e30),
                    data_options=COMMON['data_options'])
    orphan = make_run('digits', 'cnn_tiny', 'kd', teacher=wild, **COMMON)
    assert main(command(tmp_path, wild, TEACHER, orphan)) == 0
    said, store = capsys.readouterr().err.splitlines(), Store(tmp_path/'store')
    assert 'the loss is not finite in epoch' in said[0] and 'was not made: its teacher' in said[1]
    assert store.result(TEACHER) and store.result(wild) is None and store.diverged(wild)['epoch'] >= 1
    monkeypatch.setattr(subprocess, 'Popen',
                        lambda *_, **__: pytest.fail('a worker is started although there is nothing to compute'))
    assert execute_in_processes(Plan.of([orphan, TEACHER]), store) == said


def test_knockoff_with_a_budget_and_a_folder_of_images(with_teacher, tmp_path):
    pictures = tmp_path/'pictures'
    pictures.mkdir()
    for i in range(40): Image.new('L', (8, 8), 6*i).save(pictures/f'{i:02}.png')
    recipe = Recipe(epochs=2, batch_size=16, lr=.05, augment='none')
    data_options = COMMON['data_options']
    runs = [make_run('digits', 'cnn_tiny', 'knockoff', teacher=TEACHER, recipe=recipe, data_options=data_options,
                     **options)
            for options in ({'budget': 50}, {'transfer': f'folder:{pictures}', 'budget': 30},
                            {'transfer': f'folder:{pictures}'})]
    store = Store(with_teacher/'store')
    assert execute(Plan.of(runs), store) == []
    assert all(store.result(run)['accuracy'] > 0 for run in runs) and len({run.id for run in runs}) == 3
