"""What a number was made with: the same data for a run, its teacher and its second half, and the code of today, or it is said."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmim_repro.core import Unusable
from cmim_repro.exhibits import figure3
from cmim_repro.experiments import execution
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store, code_digest, revision
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.exhibit import Exhibit
from cmim_repro.report.results import provenance_note

ROOT = Path(__file__).resolve().parents[1]
CPU = Settings(device='cpu', checkpoint_seconds=0)
COMMON = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 10, 'test_per_class': 5}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
STUDENT = make_run('digits', 'cnn_tiny', 'kd', teacher=TEACHER, **COMMON)


class Stop(Exception): pass


def after_first_epoch(done, total, text):
    if text.endswith('epoch 1'): raise Stop


@pytest.fixture
def other_copy(monkeypatch):
    "From now on the same data set has another sum: another copy, with other pixels."
    real = execution.load_data

    def load(run, *places, **facts):
        data = real(run, *places, **facts)
        monkeypatch.setattr(data, 'checksum', dict.fromkeys(data.checksum, 'sha256:other'))
        return data
    return lambda: monkeypatch.setattr(execution, 'load_data', load)


def test_a_student_does_not_learn_on_another_copy_than_its_teacher(tmp_path, other_copy):
    store = Store(tmp_path)
    execute(Plan.of([TEACHER]), store, CPU)
    assert store.result(TEACHER)['data']['checksum']
    other_copy()
    with pytest.raises(Unusable, match=f'{TEACHER.name} was made from other data: .* use the same copy for both, or another store'):
        execute(Plan.of([STUDENT]), store, CPU)
    assert store.result(TEACHER) and not store.result(STUDENT)


def test_a_run_does_not_go_on_with_other_data(tmp_path, other_copy):
    store = Store(tmp_path)
    with pytest.raises(Stop): execute(Plan.of([TEACHER]), store, CPU, progress=after_first_epoch)
    other_copy()
    with pytest.raises(Unusable, match=f'{TEACHER.name} has begun on other data: .* bring back what was there'):
        execute(Plan.of([TEACHER]), store, CPU)
    assert (store.folder(TEACHER)/'checkpoint.pt').exists() # nothing is lost


def test_the_pictures_of_a_transfer_set_are_part_of_the_data(tmp_path):
    pictures, store = tmp_path/'pictures', Store(tmp_path/'store')
    pictures.mkdir()
    rng = np.random.default_rng(0)
    def draw(name): Image.fromarray(rng.integers(255, size=(8, 8), dtype=np.uint8)).save(pictures/name)
    for i in range(40): draw(f'{i:02}.png')
    thief = make_run('digits', 'cnn_tiny', 'knockoff', teacher=TEACHER, transfer=f'folder:{pictures}', **COMMON)
    execute(Plan.of([TEACHER]), store, CPU)
    with pytest.raises(Stop): execute(Plan.of([thief]), store, CPU, progress=after_first_epoch)
    before = (pictures/'07.png').read_bytes()
    draw('07.png')
    with pytest.raises(Unusable, match='has begun on other data: transfer set folder: images has the sum sha256:'): execute(Plan.of([thief]), store, CPU)
    (pictures/'07.png').write_bytes(before)
    execute(Plan.of([thief]), store, CPU)
    data = store.result(thief)['data']
    assert data['verified'] is False and data['checksum']['transfer set folder: images'].startswith('sha256:') and data['images']['train'] == 40


def checkout(tmp_path, file, *changes):
    "A second checkout of the package in which a file is changed; a function that asks it for digests."
    copy = tmp_path/'checkout'
    shutil.copytree(ROOT/'cmim_repro', copy/'cmim_repro', ignore=shutil.ignore_patterns('__pycache__'))
    text = (copy/'cmim_repro'/file).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (copy/'cmim_repro'/file).write_text(text)
    code = 'import sys, json\nfrom cmim_repro.experiments.runs import run_from_dict\nfrom cmim_repro.experiments.store import code_digest\n' \
           'print(json.dumps([code_digest(run_from_dict(d)) for d in json.loads(sys.argv[1])]))'

    def digests(*runs):
        done = subprocess.run([sys.executable, '-c', code, json.dumps([run.to_dict() for run in runs])], capture_output=True, text=True,
                              cwd=copy, env={**os.environ, 'PYTHONPATH': str(copy)})
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return digests


ALONE = make_run('digits', 'cnn_tiny', 'ls', **COMMON)
RUNS = (TEACHER, STUDENT, ALONE)


@pytest.mark.parametrize('file, changes, changed', [
    ('attacks/kd.py', [('return (1 - self.weight)', 'return 0 * (1 - self.weight)')], [False, True, False]),
    ('attacks/kd.py', [('"Distillation (Hinton', '"Plain distillation (Hinton')], [False, False, False]),
    ('attacks/kd.py', [('import torch.nn.functional as F\n', 'import torch.nn.functional as F # a comment\n')], [False, False, False]),
    ('defenses/ce.py', [('return F.cross_entropy(logits, labels)', 'return 2*F.cross_entropy(logits, labels)')], [True, True, False]),
    ('theory/distributions.py', [('.log_softmax(-1)', '.log_softmax(dim=-1)')], [False, True, False]),
    ('lab/training.py', [('optimizer.zero_grad(set_to_none=True)', 'optimizer.zero_grad()')], [True, True, True]),
    ('lab/models/small.py', [('def ', 'def ')], [False, False, False])], ids=['loss', 'docstring', 'comment', 'teacher', 'reached', 'loop', 'nothing'])
def test_the_digest_follows_the_code_that_decides(tmp_path, file, changes, changed):
    found = checkout(tmp_path, file, *changes)(*RUNS)
    assert [now != code_digest(run) for now, run in zip(found, RUNS, strict=True)] == changed


def test_what_other_code_has_made_is_marked_and_made_again_on_request(tmp_path):
    asked = {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'figures'), 'epochs': '1', 'seeds': '1', 'workers': '1'}
    entries = figure3.entries(narrowed(profile('smoke'), seeds=1, overrides='epochs=1'))
    store = Store(tmp_path/'store')
    Exhibit('figure3', asked).run(figure3.entries)
    assert store.result(entries[0].run) and 'other code' not in provenance_note(entries, store, 'x')
    store.finish(entries[0].run, {**store.result(entries[0].run), 'code': 'older', 'accuracy': .123})
    assert "Made by other code than today's: 1 of these runs; `-p renew True` repeats them." in provenance_note(entries, store, 'x')
    Exhibit('figure3', asked).run(figure3.entries)
    assert store.result(entries[0].run)['accuracy'] == .123 # marked, but not touched unless it is asked for
    Exhibit('figure3', {**asked, 'renew': 'True'}).run(figure3.entries)
    assert store.result(entries[0].run)['code'] == code_digest(entries[0].run) and store.result(entries[0].run)['accuracy'] != .123
    [aside] = (tmp_path/'store'/'set_aside').iterdir()
    assert json.loads((aside/'result.json').read_text())['accuracy'] == .123


def repository(folder):
    folder.mkdir()
    return recorded(folder, '--allow-empty')


def recorded(folder, *words):
    "A repository with what is in the folder."
    for command in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '-m', 'it', *words]):
        subprocess.run(['git', *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def unpacked(monkeypatch):
    "A function that puts the package into a folder, from where it is used."
    monkeypatch.delenv('CMIM_REVISION', raising=False)
    def unpack(place):
        (place/'cmim_repro').mkdir(parents=True)
        for name in ('__init__.py', 'core.py'): shutil.copy(ROOT/'cmim_repro'/name, place/'cmim_repro')
        shutil.copy(ROOT/'settings.ini', place)
        monkeypatch.setattr('cmim_repro.__file__', str(place/'cmim_repro'/'__init__.py'))
        return place
    return unpack


def test_the_revision_is_never_that_of_another_repository(tmp_path, monkeypatch, unpacked):
    "A package installed elsewhere and used in somebody's checkout, and archives unpacked inside and at the top of one."
    theirs = repository(tmp_path/'theirs')
    monkeypatch.chdir(theirs)
    for place in (tmp_path/'installed', theirs/'inside', theirs):
        unpacked(place)
        assert revision() == 'unknown'
    monkeypatch.setenv('CMIM_REVISION', 'mine')
    assert revision() == 'mine'


def test_the_own_checkout_is_told_and_one_that_git_does_not_trust_is_said_to_be_that(tmp_path, monkeypatch, unpacked):
    own = recorded(unpacked(tmp_path/'own'))
    assert len(revision()) == 12
    (own/'cmim_repro'/'core.py').write_text('', encoding='utf-8')
    assert revision().endswith('+changes')
    monkeypatch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')
    with pytest.warns(UserWarning, match='dubious ownership.*CMIM_REVISION'): assert revision() == 'unknown'
