"""Papermill runs the notebook from anywhere; a second run computes nothing; bad parameters end it with one sentence."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


def papermill(folder, *parameters, notebook='run_table1'):
    pairs = [part for name, value in parameters for part in ('-p', name, str(value))]
    environment = {**os.environ, 'CMIM_STORE': str(folder/'store'), 'CMIM_DATA': str(folder/'data'),
                   'CMIM_PROFILE': 'smoke'}
    return subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', str(ROOT/'nbs'/f'{notebook}.ipynb'),
                           str(folder/'out.ipynb'), *pairs],
                          capture_output=True, text=True, cwd=folder, env=environment)


NARROW = [('defenses', 'cmim, st'), ('attacks', 'kd, dkd')]


def test_table_from_nothing_and_again_from_the_store(tmp_path):
    first = papermill(tmp_path, *NARROW, ('figures', tmp_path/'figures'))
    assert first.returncode == 0, first.stderr[-2000:]
    table = pd.read_csv(tmp_path/'figures'/'table1.csv')
    assert set(table['column']) == {'ls', 'kd', 'dkd', 'best'}
    assert (table['n'] == 2).all() and table['mean'].between(0, 100).all()
    made = {p.name for p in (tmp_path/'figures').iterdir()}
    assert {'table1.tex', 'table1.html', 'models.csv', 'cmi.csv', 'cmi_digits_cnn_small.png',
            'simplex_digits_cnn_small.html'} <= made
    note = (tmp_path/'figures'/'table1.md').read_text()
    assert "-p profile smoke -p defenses 'cmim, st' -p attacks 'kd, dkd'` from" in note
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'store').glob('*/*.json')}
    again = papermill(tmp_path, *NARROW, ('figures', tmp_path/'figures2'))
    assert again.returncode == 0 and {p: p.stat().st_mtime_ns for p in (tmp_path/'store').glob('*/*.json')} == stamps
    assert pd.read_csv(tmp_path/'figures2'/'table1.csv').equals(table)


@pytest.mark.parametrize('parameters, words', [
    pytest.param([('profle', 'quick')], "Unknown parameter 'profle'; accepted: profile", marks=pytest.mark.slow),
    pytest.param([('profile', 'fast')], "Unknown profile 'fast'; accepted: smoke, quick, mini, paper",
                 marks=pytest.mark.slow),
    pytest.param([('workers', 'two')], "workers is 'two'; it must be a whole number.", marks=pytest.mark.slow),
    ([('profile', 'mini')], 'has no train and no test')], ids=['parameter', 'profile', 'workers', 'data'])
def test_bad_parameters_end_with_one_sentence(tmp_path, parameters, words):
    if parameters == [('profile', 'mini')]:
        (tmp_path/'empty').mkdir(); parameters = [*parameters, ('data_root', tmp_path/'empty'), ('workers', 1)]
    found = papermill(tmp_path, *parameters)
    assert found.returncode != 0
    outputs = [o for cell in json.loads((tmp_path/'out.ipynb').read_text())['cells'] for o in cell.get('outputs', [])
               if o['output_type'] == 'error']
    assert len(outputs) == 1 and words in outputs[0]['evalue']
    assert len([line for line in outputs[0]['traceback'] if line.strip()]) == 1
