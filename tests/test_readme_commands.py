"""Every command in the README runs: as printed, or with what makes it small enough for a test."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
STARTS = 'make|papermill|python|torchrun'
PRINTED = {re.split(r'  +#', line)[0].strip() for line in re.findall(rf'^    ((?:{STARTS}) .*)$', README, re.M)}
PRINTED |= set(re.findall(rf'`((?:{STARTS}) [^`]+)`', README))

PLAN = '-p plan_only True' # what would be computed, after all parameters are checked
SMALL = 'PROFILE=smoke ARGS="-p plan_only True"'
RUN = [f'papermill nbs/run_table1.ipynb OUT.ipynb -p profile {rest}' for rest in ('quick', 'mini -p data_root DIR', 'paper -p data_root DIR')]
AS_PRINTED = {
    'make help': 'make table1', 'python -m cmim_repro --help': 'audit',
    'papermill nbs/run_table1.ipynb OUT.ipynb -p profile paper -p plan_only True': 'OUT.ipynb',
    'papermill nbs/run_table1.ipynb OUT.ipynb -p profile mini -p store data/results/mini/store': 'figures/mini/table1.csv',
    'papermill nbs/run_table1.ipynb OUT.ipynb -p profile quick -p store data/results/quick/store': 'figures/quick/table1.csv',
    'python -m cmim_repro plan table1 --profile paper -p executor torchrun:8 --out PLAN.json': 'PLAN.json',
    'python -m cmim_repro audit answers.npz --out report': 'report/audit.html',
    'papermill nbs/run_audit.ipynb OUT.ipynb -p answers answers.npz': 'OUT.ipynb',
}
SMALLER = { # a command to what it is run as here
    'make table1': 'make table1 PROFILE=smoke ARGS="-p defenses cmim -p attacks kd -p seeds 1"',
    'make -j2 tables figures': f'make -j2 tables figures EXHIBITS="table4 figure2" {SMALL}', # one of each
    'make beyond': f'make beyond EXHIBITS=beyond2 {SMALL}',
    'make lab': 'make lab ARGS=--version',
    **{command: f'{command} {PLAN}' for command in RUN},
    'torchrun --standalone --nproc-per-node 8 -m cmim_repro.experiments.execution PLAN.json --store DIR':
        'python -m cmim_repro plan table1 --profile smoke -p defenses st -p attacks kd -p null_arms none -p seeds 1 -p overrides "epochs=1, epsilons=0.1" '
        '-p executor torchrun:2 --out PLAN.json && torchrun --standalone --nproc-per-node 2 -m cmim_repro.experiments.execution PLAN.json --store DIR',
    'python -m cmim_repro audit --model mine:answer --data DIR --budget 30m --thief-images 20%':
        'python -m cmim_repro audit --model mine:answer --data PICTURES --budget 5s --thief-images 20%',
}
DRY = { # what takes minutes or is this very test; make says what it would do, and the named tests do it
    'make test': 'pytest -q', 'make book': 'cmim_repro.report.book', # test_book
    'make cost': 'cmim_repro.experiments.then_and_now', # the notebooks of nbs/experiments
    'make pilot DATA=DIR': 'cmim_repro.experiments.pilot --data-root DIR', # test_pilot
}


def test_all_of_them_are_known():
    assert PRINTED == {*AS_PRINTED, *SMALLER, *DRY}


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A copy of what is committed, with this environment as its .venv, answers of a classifier, and pictures."
    folder = tmp_path_factory.mktemp('checkout')/'copy'
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('this is no checkout')
    for name in filter(None, listed.stdout.split('\0')):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT/name).is_file(): shutil.copy2(ROOT/name, folder/name)
    (folder/'.venv').mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith('.'): (folder/'.venv'/part.name).symlink_to(part)
    for mark in ('.installed', '.frameworks'): (folder/'.venv'/mark).touch()
    rng = np.random.default_rng(0)
    np.savez(folder/'answers.npz', logits=rng.normal(size=(60, 3)), labels=np.arange(60) % 3)
    write_pictures(folder/'PICTURES', rng)
    (folder/'mine.py').write_text('import torch\n\ndef answer(images): return images.mean((2, 3))[:, :2]*9\n')
    return folder


def write_pictures(folder, rng):
    from PIL import Image
    for part, count in (('train', 40), ('val', 12)):
        for label in range(2):
            (folder/part/f'class{label}').mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 156, (16, 16, 3)).astype('uint8')
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder/part/f'class{label}'/f'{i}.png')


def ran(command, folder):
    "What it writes; it must end well, and is run as the README says: in the root, with the environment active."
    environment = {k: v for k, v in os.environ.items() if not k.startswith('CMIM_') and k != 'IN_TEST'}
    environment |= {'PATH': f"{folder/'.venv'/'bin'}:{os.environ['PATH']}", 'PYTHONPATH': str(folder), 'MAKEFLAGS': ''}
    done = subprocess.run(['bash', '-c', command], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    return done.stdout


@pytest.mark.parametrize('command', AS_PRINTED)
def test_as_printed(command, checkout):
    expected = AS_PRINTED[command]
    (checkout/expected).unlink(missing_ok=True) # another command's
    said = ran(command, checkout)
    assert expected in said or (checkout/expected).stat().st_size > 100
    if expected.startswith('figures/'): assert (checkout/expected).read_text() == (ROOT/expected.replace('figures', 'data/results')).read_text()


@pytest.mark.parametrize('command', SMALLER)
def test_smaller(command, checkout): ran(SMALLER[command], checkout)


@pytest.mark.parametrize('command', DRY)
def test_what_make_would_do(command, checkout): assert DRY[command] in ran(f'make -n {command.removeprefix("make ")}', checkout)
