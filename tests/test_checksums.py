"""What lies in a store is verified when it is read: a changed bit is damage, a lack of memory or permission is not."""
import io
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from cmim_repro.core import Invalid, Unusable, unreadable
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Damaged, Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.exhibit import Exhibit

COMMON = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 20}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
STUDENT = make_run('digits', 'cnn_tiny', 'kd', teacher=TEACHER, **COMMON)
SETTINGS = Settings(device='cpu', checkpoint_seconds=0)


class Stopped(Exception): pass


def after_one_epoch(store, run):
    "A run whose process ended after its first epoch."
    def stop(done, total, text):
        if text.endswith('epoch 1'): raise Stopped
    with pytest.raises(Stopped): execute(Plan.of([run]), store, SETTINGS, progress=stop)
    return store.folder(run)/'checkpoint.pt'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A store with a finished teacher and a student that is half done; the student's end; a place for copies."
    folder = tmp_path_factory.mktemp('made')
    store = Store(folder/'store')
    execute(Plan.of([TEACHER]), store, SETTINGS)
    after_one_epoch(store, STUDENT)
    whole = Store(shutil.copytree(folder/'store', folder/'whole'))
    execute(Plan.of([STUDENT]), whole, SETTINGS)
    return folder/'store', whole


@pytest.fixture
def store(made, tmp_path): return Store(shutil.copytree(made[0], tmp_path/'store'))


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit//8] ^= 1 << bit % 8
    path.write_bytes(content)


def places(path, count):
    "Bits anywhere in a file, and its first ones."
    bits, chance = 8*path.stat().st_size, random.Random(path.name)
    return [chance.randrange(bits) for _ in range(count)] + list(range(0, min(bits, 160), 40))


def answers(store):
    return {name: (value.dtype, value.tolist()) for name, value in store.tensors(TEACHER, 'weights.safetensors').items()}


LOOKS = {'weights.safetensors': answers, 'result.json': lambda store: store.result(TEACHER),
         'log_probs.safetensors': lambda store: [value.tolist() for value in store.log_probs(TEACHER)],
         'metrics.jsonl': lambda store: store.metrics(TEACHER)}


@pytest.mark.parametrize('file', LOOKS)
def test_a_flipped_bit_is_named_or_changes_nothing(store, file):
    path, look = store.folder(TEACHER)/file, LOOKS[file]
    content, before, named = path.read_bytes(), look(store), 0
    for bit in places(path, 60):
        flipped(path, bit)
        try: assert {**look(store)} == before if file == 'result.json' else look(store) == before
        except Unusable as error:
            named += 1
            assert file in str(error) and 'damaged' in str(error) and 'delete' not in str(error), error
        path.write_bytes(content)
    assert named > 50


def test_no_bit_of_the_checksum_or_of_its_name_changes_a_result_in_silence(store):
    path, before = store.folder(TEACHER)/'result.json', store.result(TEACHER)
    content = path.read_bytes()
    assert content.rindex(b'"checksum"') > len(content) - 100
    for bit in range(8*len(content) - 800, 8*len(content)):
        flipped(path, bit)
        try: assert store.result(TEACHER) == before, bit
        except Unusable as error: assert 'damaged' in str(error)
        path.write_bytes(content)


@pytest.mark.filterwarnings('ignore:.* was damaged')
def test_a_flipped_bit_in_a_checkpoint_changes_no_weight(store):
    path = store.folder(STUDENT)/'checkpoint.pt'
    content, named = path.read_bytes(), 0
    for bit in places(path, 80):
        path.write_bytes(content)
        flipped(path, bit)
        store.check_checkpoint(STUDENT)
        if not path.exists():
            named += 1
            assert path.with_name(f'checkpoint.pt.damaged-{named}').exists()
        else: # what is left is what was written, wherever PyTorch looks
            found, wanted = (torch.load(where, weights_only=True)['model'] for where in (path, io.BytesIO(content)))
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert named > 60


@pytest.mark.parametrize('changes', [{'epoch': 99}, {'epoch': -1}, {'done': -3}, {'history': []}, {'epoch': None},
                                     {'origin': {'run': TEACHER.id}}], ids=str)
def test_a_checkpoint_that_does_not_fit_is_set_aside_and_the_run_ends_the_same(store, made, changes):
    path = store.folder(STUDENT)/'checkpoint.pt'
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.warns(UserWarning, match='does not fit the run'): execute(Plan.of([STUDENT]), store, SETTINGS)
    whole = made[1].tensors(STUDENT, 'weights.safetensors')
    torch.testing.assert_close(store.tensors(STUDENT, 'weights.safetensors'), whole, rtol=0, atol=0)
    assert path.with_name('checkpoint.pt.damaged-1').exists()


@pytest.mark.parametrize('values', [{'accuracy': 1.5}, {'accuracy': 'high'}, {'best_accuracy': -1}, {'accuracy': float('nan')},
                                    {'seconds': -1}, {'seconds': True}], ids=str)
def test_a_result_that_cannot_be(store, values):
    store.finish(TEACHER, {**store.result(TEACHER), **values})
    with pytest.raises(Unusable, match=f"damaged .{[*values][0]} is"): store.result(TEACHER)


@pytest.mark.parametrize('text', ['[]', 'null', '3', '"text"', '{}', '{"id": "other"}', '\xff'])
def test_no_result_at_all(store, text):
    for file in ('result.json', 'diverged.json'):
        for path in store.folder(TEACHER).glob('*.json'):
            if path.name != 'run.json': path.unlink()
        (store.folder(TEACHER)/file).write_bytes(text.encode('latin1'))
        with pytest.raises(Unusable, match=f'{file} is damaged'): store.finished(TEACHER)


def test_a_note_of_divergence_belongs_to_its_run(store):
    store.give_up(TEACHER, 'the loss is not finite', 1, {})
    shutil.copy(store.folder(TEACHER)/'diverged.json', store.folder(STUDENT)/'diverged.json')
    assert store.diverged(TEACHER)['sentence'] == 'the loss is not finite'
    with pytest.raises(Unusable, match='does not belong to the run'): store.finished(STUDENT)


def test_files_of_another_run_or_another_training_are_refused(store):
    store.save_tensors(STUDENT, 'weights.safetensors', store.tensors(TEACHER, 'weights.safetensors'))
    shutil.copy(store.folder(STUDENT)/'weights.safetensors', store.folder(TEACHER)/'weights.safetensors')
    with pytest.raises(Unusable, match='belongs to the run'): answers(store)
    store.save_tensors(TEACHER, 'weights.safetensors', {'a': torch.zeros(2)}) # the result knows others
    with pytest.raises(Unusable, match='its checksum does not fit'): answers(store)


def test_what_was_written_without_sums_is_read_without_a_word(store, recwarn):
    folder, weights = store.folder(TEACHER), store.tensors(TEACHER, 'weights.safetensors')
    (folder/'weights.safetensors').write_bytes(safetensors.torch.save(weights))
    old = {name: value for name, value in store.result(TEACHER).items() if name not in ('files', 'run')}
    (folder/'result.json').write_text(json.dumps(old, indent=1))
    assert store.result(TEACHER) == old and answers(store) and store.metrics(TEACHER) and not recwarn.list


@pytest.mark.parametrize('error, words', [(PermissionError(13, 'Permission denied'), 'cannot be read (Permission denied)'),
                                          (OSError(24, 'Too many open files'), 'cannot be read (Too many open files)'),
                                          (MemoryError(), 'too little memory'),
                                          (torch.OutOfMemoryError('CUDA out of memory'), 'too little memory'),
                                          (RuntimeError("can't allocate memory"), 'too little memory')])
def test_only_a_wrong_content_is_damage(store, monkeypatch, error, words):
    def fails(*_, **__): raise error
    assert words in str(unreadable('x', error))
    monkeypatch.setattr('safetensors.torch.load', fails)
    monkeypatch.setattr('torch.load', fails)
    for look in (lambda: answers(store), lambda: store.check_checkpoint(STUDENT)):
        with pytest.raises(Invalid) as said: look()
        assert words in str(said.value) and 'damaged' not in str(said.value)
    assert (store.folder(STUDENT)/'checkpoint.pt').exists()


@pytest.mark.parametrize('spoil, words', [
    (lambda w: {**w, 'head.2.weight': w['head.2.weight']*float('nan')}, 'numbers that are not finite, in head.2.weight'),
    (lambda w: {name: value for name, value in w.items() if 'head' not in name}, 'does not hold the weights of the network'),
    (lambda w: {name: value[:1] for name, value in w.items() if value.ndim}, 'does not hold the weights of the network')])
def test_a_teacher_whose_weights_are_no_good_is_named_and_nothing_is_noted_of_the_student(store, spoil, words):
    weights = store.tensors(TEACHER, 'weights.safetensors')
    name = next(name for name in weights if 'head' in name and name.endswith('weight'))
    weights['head.2.weight'] = weights.pop(name)
    spoiled = spoil(weights)
    spoiled = {name if key == 'head.2.weight' else key: value for key, value in spoiled.items()}
    store.save_tensors(TEACHER, 'weights.safetensors', spoiled)
    store.finish(TEACHER, store.result(TEACHER))
    with pytest.raises(Unusable, match=words.replace('head.2.weight', name)) as said: execute(Plan.of([STUDENT]), store, SETTINGS)
    assert TEACHER.name in str(said.value) and '\n' not in str(said.value) and not store.finished(STUDENT)


SPOILED = {'result.json': lambda path: path.write_text('{"id": '), 'weights.safetensors': lambda path: flipped(path, 8*path.stat().st_size - 3),
           'metrics.jsonl': lambda path: flipped(path, 9), 'log_probs.safetensors': lambda path: path.unlink(), 'run.json': lambda path: path.write_text('{}')}


@pytest.mark.parametrize('file', SPOILED)
def test_a_damaged_run_is_set_aside_with_renew_and_made_again(store, monkeypatch, file):
    "All of its files are kept, the new ones are what they were, and nothing else is made again."
    told, wanted, folder = [], answers(store), store.folder(TEACHER)
    SPOILED[file](folder/file)
    monkeypatch.setattr('cmim_repro.report.exhibit.tell', lambda text, page: told.append(text))
    asked = {'profile': 'smoke', 'store': str(store.root), 'figures': str(store.root.parent/'figures'), 'device': 'cpu'}
    entries = lambda **given: [SimpleNamespace(run=STUDENT, data='digits')]
    if file == 'result.json':
        with pytest.raises(Damaged, match='result.json is damaged .*; move its folder out of the store, or let -p renew True set it aside'): Exhibit('figure3', asked).run(entries)
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    Exhibit('figure3', {**asked, 'renew': 'True'}).run(entries)
    [aside] = (store.root/'set_aside').iterdir()
    assert aside.name == f'{TEACHER.name}-1' and {path.name: path.read_bytes() for path in aside.iterdir()} == there
    assert answers(store) == wanted and store.finished(STUDENT) and store.damage(TEACHER) is None
    assert f'1 runs of the store were damaged, are set aside and made again: {folder/file} is ' in told[0]
    told.clear()
    Exhibit('figure3', {**asked, 'renew': 'True'}).run(entries)
    assert len(list((store.root/'set_aside').iterdir())) == 1 and told == ['2 runs, all of them finished.']


def test_no_permission_is_no_damage_and_nothing_is_set_aside(store, monkeypatch):
    def fails(*_, **__): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('safetensors.torch.load', fails)
    with pytest.raises(Unusable, match='cannot be read'): store.damage(TEACHER)
    assert store.damage(STUDENT) is None
