"""The pilot as it is started on a borrowed GPU, in small: end to end, out of time, with bad input, and with nothing but what such a machine has."""
import csv
import os
import pickle
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from cmim_repro.experiments import pilot

FILES = {'pilot.log', 'throughput.csv', 'kernels.csv', 'results.csv', 'metrics.csv', 'summary.txt', 'results.tar.gz'}
MISSING = ('sklearn', 'nbdev', 'papermill', 'plotly', 'seaborn', 'jupyter', 'jupyterlab', 'jupyter_client', 'fastcore', 'IPython', 'ipywidgets', 'tqdm', 'mistune',
           'jinja2', 'dask', 'distributed', 'hypothesis', 'psutil')
BLOCK = f"""
import sys
from importlib.machinery import PathFinder
class Present:
    "Finds what is installed, but none of these."
    def find_distributions(self, *context): return PathFinder.find_distributions(*context)
    def find_spec(self, name, *more): return None if name.partition('.')[0] in {MISSING!r} else PathFinder.find_spec(name, *more)
sys.meta_path = [Present() if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Random images in CIFAR-100's files, six and two of a class."
    root, draw = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    folder = root/'cifar-100-python'
    folder.mkdir()
    for split, count in (('train', 6), ('test', 2)):
        labels = list(range(100))*count
        pixels = draw.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder/split).write_bytes(pickle.dumps({'data': pixels, 'fine_labels': labels, 'coarse_labels': [label//5 for label in labels]}))
    names = {f'{kind}_label_names': [f'{kind} {i}' for i in range(count)] for kind, count in (('fine', 100), ('coarse', 20))}
    (folder/'meta').write_bytes(pickle.dumps(names))
    return root


def arguments(data, folder, *more): return ['--data-root', str(data), '--store', str(folder/'store'), '--out', str(folder/'out'), '--device', 'cpu', '--tiny', *more]


def table(path):
    with open(path, newline='') as file: return list(csv.DictReader(file))


def test_from_end_to_end_and_again(data, tmp_path, capfd):
    out, wanted = tmp_path/'out', arguments(data, tmp_path, '--minutes', '3', '--skip', 'tests,throughput')
    assert pilot.main(wanted) == 0
    assert {path.name for path in out.iterdir()} == FILES - {'throughput.csv', 'kernels.csv'}
    results = table(out/'results.csv')
    assert {row['teacher_method'] for row in results} == {'', 'ce', 'ls', 'cmim'} and {row['model'] for row in results} == {'cnn_small', 'cnn_tiny'}
    assert len(table(out/'metrics.csv')) == len(results) == 3 + 2 + 3*(4 + 3) # the table's KD, DKD twice and knockoff, and a setting of each tuned attack; DKD's is the table's
    assert 'Gain in points' in (out/'summary.txt').read_text()
    with tarfile.open(out/'results.tar.gz') as archive: assert {name.rpartition('/')[2] for name in archive.getnames()} == {'run.json', 'result.json', 'metrics.jsonl'}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path/'store').glob('*/result.json')}
    assert pilot.main([*wanted, '--inside', 'table', '--until', str(time.time() + 60)]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path/'store').glob('*/result.json')}
    assert 'all stages are done' in capfd.readouterr().out


def test_a_deadline_that_is_over_at_once_leaves_files(data, tmp_path):
    assert pilot.main(arguments(data, tmp_path, '--minutes', '.001')) == 0
    assert {path.name for path in (tmp_path/'out').iterdir()} == FILES - {'throughput.csv', 'kernels.csv'}
    assert 'Nothing is finished' in (tmp_path/'out'/'summary.txt').read_text()


def test_the_deadline_stops_a_training_and_it_goes_on(data, tmp_path, capfd):
    inside = arguments(data, tmp_path, '--epochs', '50', '--inside', 'table', '--until')
    assert pilot.main([*inside, str(time.time() + 4)]) == 0
    assert 'the time is up' in capfd.readouterr().out and not list((tmp_path/'store').glob('anchored-*/result.json'))
    assert list((tmp_path/'store').glob('*/metrics.jsonl'))


@pytest.mark.parametrize('more,said', [(('--part', 'some'), "Unknown part 'some'"), (('--part', 'half'), 'needs 250'), (('--minutes', '0'), 'minutes'),
                                       (('--epochs', '0'), 'epochs'), (('--skip', 'all'), "'all'"), (('--overrides', 'lrr=1'), "'lrr'"), (('--overrides', 'lr=0'), 'lr is 0'),
                                       (('--device', 'gpu'), "'gpu'")])
def test_bad_input_is_one_sentence(data, tmp_path, capsys, more, said):
    assert pilot.main(arguments(data, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path/'out').exists()


def test_the_recipe_may_be_changed(data, tmp_path):
    wanted = arguments(data, tmp_path, '--minutes', '3', '--skip', 'tests,throughput', '--overrides', 'lr=.02, schedule=cosine', '--teachers', 'ce', '--attacks', 'kd')
    assert pilot.main(wanted) == 0
    recipes = {(run.recipe.lr, run.recipe.schedule) for run in pilot.Store(tmp_path/'store').runs()}
    assert recipes == {(.02, 'cosine')}


def test_a_missing_folder_is_one_sentence(tmp_path, capsys):
    assert pilot.main(arguments(tmp_path/'nowhere', tmp_path)) == 2
    assert 'nowhere is not there' in capsys.readouterr().err


def blocked(program, **options): return subprocess.run([sys.executable, '-c', f'{BLOCK}\n{program}'], capture_output=True, text=True, **options)


def test_it_needs_no_more_than_such_a_machine_has(data, tmp_path):
    (tmp_path/'out').mkdir()
    inside = arguments(data, tmp_path, '--until', str(time.time() + 60), '--inside')
    found = blocked(f"""
from cmim_repro.experiments import pilot
status = [pilot.main([*{inside!r}, part]) for part in ('throughput', 'table')]
pilot.report(pilot.Desk(pilot.Path({str(tmp_path/'out')!r}), 0.), pilot.Store({str(tmp_path/'store')!r}))
sys.exit(status != [0, 0])""")
    assert found.returncode == 0 and 'Error' not in found.stdout, found.stdout + found.stderr
    assert {path.name for path in (tmp_path/'out').iterdir()} == FILES
    rows = table(tmp_path/'out'/'throughput.csv')
    assert {row['mode'] for row in rows} >= {'eager', 'textbook'} and not any(row['error'] for row in rows)
    kernels = table(tmp_path/'out'/'kernels.csv')
    assert {row['measurement'] for row in kernels} == {'kernels of cnn_tiny'} and all(float(row['ms a step']) > 0 for row in kernels)
    assert len({row['measurement'] for row in rows}) == 7 and all(float(row['images/s']) > 0 and row['revision'] for row in rows)


def test_files_with_gpu_tests_need_no_more_either():
    files = pilot.marked_tests()
    assert [path.rpartition('/')[2] for path in files] == ['test_cuda_numbers.py', 'test_cuda.py']
    found = blocked(f'import pytest\nsys.exit(pytest.main(["-m", "cuda", "-q", "-p", "no:cacheprovider", "--collect-only", *{files!r}]))',
                    env={**os.environ, 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'})
    assert found.returncode == 0 and ' error' not in found.stdout, found.stdout + found.stderr


def test_a_process_that_lost_its_gpu_is_started_again(data, tmp_path, monkeypatch):
    statuses, started = iter([pilot.POISONED, 0, 1, 0]), []
    monkeypatch.setattr(pilot, 'ended', lambda command, seconds, **_: started.append(command) or next(statuses))
    assert pilot.main(arguments(data, tmp_path, '--minutes', '3', '--skip', 'tests')) == 0
    parts = [command[command.index('--inside') + 1] for command in started]
    assert parts == ['throughput', 'throughput', 'table', 'table'] and '--plain' in started[-1] and '--plain' not in started[-2]
