"""The pilot as it is started on a borrowed GPU, in small: end to end, out of time, with bad input, and with nothing but what such a machine has."""
import csv
import pickle
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from cmim_repro.experiments import pilot

FILES = {'pilot.log', 'throughput.csv', 'results.csv', 'metrics.csv', 'summary.txt', 'results.tar.gz'}
MISSING = ('sklearn', 'nbdev', 'papermill', 'plotly', 'seaborn', 'jupyter', 'jupyterlab', 'jupyter_client', 'fastcore', 'IPython', 'ipywidgets', 'tqdm', 'mistune',
           'jinja2', 'dask', 'distributed', 'hypothesis', 'psutil', 'mpmath')
BLOCK = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {MISSING!r}: raise ImportError(name + ' is not installed here')
sys.meta_path.insert(0, Missing())
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
    out, wanted = tmp_path/'out', arguments(data, tmp_path, '--minutes', '3', '--skip', 'tests')
    assert pilot.main(wanted) == 0
    assert {path.name for path in out.iterdir()} == FILES
    rows, results = table(out/'throughput.csv'), table(out/'results.csv')
    assert {row['mode'] for row in rows} >= {'eager', 'textbook'} and not any(row['error'] for row in rows)
    assert len({row['measurement'] for row in rows}) == 7 and all(float(row['images/s']) > 0 and row['revision'] for row in rows)
    assert {row['teacher_method'] for row in results} == {'', 'ce', 'ls', 'cmim'} and {row['model'] for row in results} == {'cnn_small', 'cnn_tiny'}
    assert len(table(out/'metrics.csv')) == len(results) == 3 + 2 + 3*(4 + 1 + 1 + 1) # the table's KD, DKD twice, and knockoff; three tuned beside them
    assert 'Gain in points' in (out/'summary.txt').read_text()
    with tarfile.open(out/'results.tar.gz') as archive: assert {name.rpartition('/')[2] for name in archive.getnames()} == {'run.json', 'result.json', 'metrics.jsonl'}
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path/'store').glob('*/result.json')}
    assert pilot.main([*wanted[:-1], 'tests,throughput']) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path/'store').glob('*/result.json')}
    assert table(out/'results.csv') == results and 'all stages are done' in capfd.readouterr().out


def test_a_deadline_that_is_over_at_once_leaves_files(data, tmp_path):
    assert pilot.main(arguments(data, tmp_path, '--minutes', '.001')) == 0
    assert {path.name for path in (tmp_path/'out').iterdir()} == FILES - {'throughput.csv'}
    assert 'Nothing is finished' in (tmp_path/'out'/'summary.txt').read_text()


def test_the_deadline_stops_a_training_and_it_goes_on(data, tmp_path, capfd):
    inside = arguments(data, tmp_path, '--epochs', '50', '--inside', 'table', '--until')
    assert pilot.main([*inside, str(time.time() + 4)]) == 0
    assert 'the time is up' in capfd.readouterr().out and not list((tmp_path/'store').glob('anchored-*/result.json'))
    assert list((tmp_path/'store').glob('*/metrics.jsonl'))


@pytest.mark.parametrize('more,said', [(('--part', 'some'), "Unknown part 'some'"), (('--part', 'half'), 'needs 250'), (('--minutes', '0'), 'minutes'),
                                       (('--epochs', '0'), 'epochs'), (('--skip', 'all'), "'all'"), (('--device', 'gpu'), "'gpu'")])
def test_bad_input_is_one_sentence(data, tmp_path, capsys, more, said):
    assert pilot.main(arguments(data, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path/'out').exists()


def test_a_missing_folder_is_one_sentence(tmp_path, capsys):
    assert pilot.main(arguments(tmp_path/'nowhere', tmp_path)) == 2
    assert 'nowhere is not there' in capsys.readouterr().err


@pytest.mark.parametrize('part', ['throughput', 'table'])
def test_it_needs_no_more_than_such_a_machine_has(data, tmp_path, part):
    inside = arguments(data, tmp_path, '--inside', part, '--until', str(time.time() + 60))
    program = f'{BLOCK}\nfrom cmim_repro.experiments import pilot\nsys.exit(pilot.main({inside!r}) if pilot.report else 1)'
    if part == 'table': program = program.replace('sys.exit(', 'desk = pilot.Desk(pilot.Path(sys.argv[1]), 0.)\nstatus = (').replace(' else 1)', ' else 1)\n') \
        + 'pilot.report(desk, pilot.Store(sys.argv[2]))\nsys.exit(status)'
    (tmp_path/'out').mkdir()
    found = subprocess.run([sys.executable, '-c', program, str(tmp_path/'out'), str(tmp_path/'store')], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert 'Error' not in found.stdout


def test_files_with_gpu_tests_need_no_more_either():
    files = pilot.marked_tests()
    assert sorted(path.rpartition('/')[2] for path in files) == ['test_cuda.py', 'test_cuda_numbers.py']
    program = f'{BLOCK}\nimport pytest\nsys.exit(pytest.main(["-m", "cuda", "-q", "-p", "no:cacheprovider", "--collect-only", *{files!r}]))'
    found = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert found.returncode == 0 and 'error' not in found.stdout.lower(), found.stdout + found.stderr


def test_a_process_that_lost_its_gpu_is_started_again(data, tmp_path, monkeypatch):
    statuses, started = iter([pilot.POISONED, 0, 1, 0]), []
    monkeypatch.setattr(pilot, 'ended', lambda command, seconds, **_: started.append(command) or next(statuses))
    assert pilot.main(arguments(data, tmp_path, '--minutes', '3', '--skip', 'tests')) == 0
    parts = [command[command.index('--inside') + 1] for command in started]
    assert parts == ['throughput', 'throughput', 'table', 'table'] and '--plain' in started[-1] and '--plain' not in started[-2]
