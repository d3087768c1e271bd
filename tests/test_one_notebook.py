"""One attack, defence, data set, network and exhibit, each added by the one notebook that CONTRIBUTING shows, and nothing else."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
PARTS = re.findall(r'^### (.*?): `(nbs/\S+\.ipynb)`\n(.*?)(?=^### |\Z)', GUIDE, re.M | re.S)


def notebook(title, text):
    "The blocks of a section as the cells of a notebook."
    cells = [{'cell_type': 'markdown', 'id': 'cell0', 'metadata': {}, 'source': [f'# {title}\n', '\n', '> An addition.']}]
    for i, block in enumerate(re.findall(r'^```python\n(.*?)^```', text, re.M | re.S), 1):
        tags = {'tags': ['parameters']} if block.startswith('profile = ') else {}
        cells.append({'cell_type': 'code', 'execution_count': None, 'id': f'cell{i}', 'metadata': tags, 'outputs': [],
                      'source': block.rstrip('\n').splitlines(keepends=True)})
    kernel = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    return {'cells': cells, 'metadata': kernel, 'nbformat': 4, 'nbformat_minor': 5}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The checkout with five more notebooks, exported."
    place = tmp_path_factory.mktemp('copy')/'checkout'
    ignored = shutil.ignore_patterns('.git', '.venv', 'runs', 'downloads', 'figures', '__pycache__', '*.egg-info', '.*_cache')
    shutil.copytree(ROOT, place, ignore=ignored)
    for title, name, text in PARTS: (place/name).write_text(json.dumps(notebook(title, text), indent=1))
    run(place, str(Path(sys.executable).parent/'nbdev_export'))
    return place


def run(place, *words, check=True):
    environment = {**os.environ, 'PYTHONPATH': str(place), 'CMIM_PROFILE': 'smoke', 'CMIM_STORE': str(place/'store'),
                   'OMP_NUM_THREADS': '1'}
    found = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
    assert not check or found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found


def papermill(place, name, *pairs):
    words = [word for key, value in pairs for word in ('-p', key, value)]
    return run(place, sys.executable, '-m', 'papermill', '--no-progress-bar', f'nbs/{name}.ipynb', str(place/f'{name}.out.ipynb'), *words)


def test_the_guide_shows_all_five(copy):
    assert [Path(name).parent.as_posix() for _, name, _ in PARTS] == [
        'nbs/attacks', 'nbs/defenses', 'nbs/lab/data', 'nbs/lab/models', 'nbs']
    for module in ('attacks/hard', 'defenses/warm', 'lab/data/stripes', 'lab/models/mlp', 'exhibits/confidence'):
        assert (copy/'cmim_repro'/f'{module}.py').exists(), module


def test_table_1_runs_with_all_of_them(copy):
    papermill(copy, 'run_table1', ('profile', 'smoke'), ('data_sets', 'stripes'), ('defenses', 'warm'), ('attacks', 'hard'),
              ('networks', 'cnn_tiny:mlp'), ('seeds', '1'))
    table = pd.read_csv(copy/'figures'/'smoke'/'table1.csv')
    assert set(table['section']) == {'stripes'} and set(table['Defense']) == {'ce', 'warm'}
    assert set(table['column']) == {'ls', 'hard', 'best'} and (table['n'] == 1).all()
    text = (copy/'figures'/'smoke'/'table1.md').read_text()
    for label in ('Stripes', 'Warm', 'Hard label', 'MLP'): assert label in text, label


def test_the_data_set_runs_with_networks_that_suit_it(copy):
    found = papermill(copy, 'run_table2', ('profile', 'smoke'), ('data_sets', 'stripes'), ('defenses', 'warm'), ('seeds', '1'),
                      ('plan_only', 'True'))
    assert found.returncode == 0
    shown = (copy/'run_table2.out.ipynb').read_text()
    assert 'stripes' in shown and 'unknown' not in shown


def test_the_new_exhibit_runs_and_is_shown(copy):
    papermill(copy, 'run_confidence', ('profile', 'smoke'), ('defenses', 'warm'), ('seeds', '1'))
    assert (copy/'figures'/'smoke'/'confidence.csv').exists()
    run(copy, sys.executable, '-m', 'cmim_repro.report.page')
    assert 'id="confidence"' in (copy/'figures'/'index.html').read_text()


def test_the_generated_tests_cover_them(copy):
    names = 'hard or warm or stripes or mlp or confidence'
    found = run(copy, sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rA', '-k', names,
                'tests/test_registries.py', 'tests/test_run_table1.py', 'tests/test_notebooks.py', check=False)
    for name in ('hard', 'warm', 'stripes', 'mlp', 'confidence'):
        assert re.search(rf'^PASSED .*{name}', found.stdout, re.M), found.stdout[-3000:]
    failed = [line for line in found.stdout.splitlines() if line.startswith('FAILED')]
    assert [line for line in failed if 'outputs' not in line and 'older' not in line] == [], found.stdout[-3000:]
