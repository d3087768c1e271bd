"More is asked for than there is: a sentence that names what was asked, of what, and how many there are; profiles ask for less."
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cmim_repro.attacks.knockoff import choose_queries
from cmim_repro.core import Invalid, keyed_generator
from cmim_repro.experiments.execution import execute, query_data
from cmim_repro.experiments.profiles import PROFILES, narrowed, profile, protected
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.tasks import task_for
from cmim_repro.lab.data.core import Facts, Size, TensorDataSet, dataset, size_of, tensor_data_set
from cmim_repro.lab.training import Settings

NOISE = np.random.default_rng(0)


def said(call):
    "The one sentence of a refusal."
    with pytest.raises(Invalid) as refusal: call()
    assert '\n' not in str(refusal.value)
    return str(refusal.value)


def images(folder, count, size=(64, 64)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count): Image.fromarray(NOISE.integers(0, 256, size, dtype=np.uint8)).save(folder/f'{folder.name}{i}.png')


def digits(root): return {}, 'three', 'zero', (146, 37)


def cifar100(root):
    "Three training and two test images of each class."
    (root/'cifar-100-python').mkdir()
    for part, each in (('train', 3), ('test', 2)):
        labels = np.repeat(np.arange(100), each).tolist()
        record = {'data': NOISE.integers(0, 256, (len(labels), 3072), dtype=np.uint8), 'fine_labels': labels,
                  'coarse_labels': [i // 5 for i in labels]}
        (root/'cifar-100-python'/part).write_bytes(pickle.dumps(record, 4))
    meta = {'fine_label_names': [f'f{i}' for i in range(100)], 'coarse_label_names': [f'c{i}' for i in range(20)]}
    (root/'cifar-100-python'/'meta').write_bytes(pickle.dumps(meta, 2))
    return {'root': root, 'allow_unverified': True}, 'f0', 'f1', (3, 2)


def imagenet(root):
    for wnid in ('n01', 'n02'):
        images(root/'train'/wnid, 3)
        images(root/'val'/wnid, 2)
    return {'root': root, 'workers': 0}, 'n01', 'n02', (3, 2)


def tinyimagenet(root):
    notes = []
    for wnid in ('n01', 'n02'):
        images(root/'train'/wnid/'images', 3)
        for i in range(2):
            images(root/'val'/'images', 0)
            Image.new('L', (64, 64)).save(root/'val'/'images'/f'{wnid}{i}.png')
            notes.append(f'{wnid}{i}.png\t{wnid}\t0\t0\t1\t1\n')
    (root/'wnids.txt').write_text('n01\nn02\n')
    (root/'words.txt').write_text('n01\tn01\nn02\tn02\n')
    (root/'val'/'val_annotations.txt').write_text(''.join(notes))
    return {'root': root}, 'n01', 'n02', (3, 2)


@pytest.fixture(params=[digits, cifar100, imagenet, tinyimagenet], ids=lambda make: make.__name__)
def data(request, tmp_path, monkeypatch):
    "Name, where it is, a class and how many training and test images it has, and another class."
    monkeypatch.setenv('CMIM_DATA', str(tmp_path/'downloads'))
    (tmp_path/'data').mkdir()
    return request.param.__name__, *request.param(tmp_path/'data')


@pytest.mark.parametrize('option, part, place', [('per_class', 'training', 0), ('test_per_class', 'test', 1)])
def test_more_images_of_a_class_than_there_are(data, option, part, place):
    name, where, first, second, counts = data
    load = lambda asked: dataset(name, classes=[first, second], **{option: asked}, **where)
    if name != 'digits': assert load(counts[place]).size('train') # as many as there are
    for asked in (counts[place] + 1, 10_000):
        found = said(lambda asked=asked: load(asked))
        assert f'{option} is {asked}, but class ' in found and f' {part} images' in found
        assert first in found or second in found
    if name == 'digits': assert said(lambda: load(146)) # 'zero' has fewer


def test_held_out_images_are_among_those_asked_for(data):
    name, where, first, second, _ = data
    part = dataset(name, classes=[first, second], per_class=3, held_out=.3, **where)
    assert part.size('train') + part.size('held_out') == 6


def test_more_pictures_than_a_folder_has(tmp_path):
    images(tmp_path, 3)
    assert dataset('folder', path=str(tmp_path), image_shape=(3, 8, 8), limit=3).size('train') == 3
    for limit in (4, 10**6): assert said(lambda limit=limit: dataset('folder', path=str(tmp_path), image_shape=(3, 8, 8), limit=limit)) == (
        f'limit is {limit}, but {tmp_path} has only 3 images.')


@pytest.mark.parametrize('size, budget', [(1, 2), (4, 5), (60_000, 10**6)])
def test_more_questions_than_images(size, budget):
    assert choose_queries(size, size).tolist() == list(range(size))
    assert f'budget is {budget}, but the transfer set has only {size} images' in said(lambda: choose_queries(size, budget))


@pytest.mark.parametrize('transfer, count', [('train', 200), ('digits', 1438), ('folder:', 5)])
def test_a_budget_above_each_kind_of_transfer_set(transfer, count, tmp_path):
    images(tmp_path, 5)
    options, where = {'per_class': 20}, {'root': None, 'allow_unverified': False, 'device': 'cpu'}
    own, teacher = dataset('digits', **options), make_run('digits', 'cnn_tiny', 'ce', data_options=options)
    transfer += str(tmp_path) if transfer == 'folder:' else ''
    exact, above = (make_run('digits', 'cnn_tiny', 'knockoff', teacher=teacher, transfer=transfer, budget=budget, data_options=options)
                    for budget in (count, count + 1))
    assert query_data(exact, own, **where).size('train') == count
    assert f'budget is {count + 1}, but the transfer set has only {count} images' in said(lambda: query_data(above, own, **where))


# ---- sizes and profiles

@pytest.mark.parametrize('name, options, words', [
    ('cifar100', {'per_class': 501}, 'per_class is 501, but the train set has at most 500 for each of 100 classes.'),
    ('cifar100', {'classes': 20, 'per_class': 10_000}, 'per_class is 10000, but the train set has at most 500 for each of 20 classes.'),
    ('tinyimagenet', {'test_per_class': 51}, 'test_per_class is 51, but the test set has at most 50'),
    ('imagenet', {'per_class': 733}, 'per_class is 733, but the train set has at most 732'),
    ('digits', {'per_class': 140}, 'per_class is 140, but the train set has at most 139'),
    ('digits', {'classes': 11}, 'classes is 11; it must be a whole number from 1 up to 10'),
    ('digits', {'per_class': 0}, 'per_class is 0; it must be a whole number from 1')], ids=str)
def test_a_size_is_not_estimated_for_what_is_refused(name, options, words): assert words in said(lambda: size_of(name, options))


def test_a_size_of_large_classes_may_be_above_the_smallest():
    chosen = {'classes': ['three', 'five'], 'per_class': 146, 'test_per_class': 36}
    data = dataset('digits', **chosen)
    assert size_of('digits', chosen) == Size(data.size('train'), data.size('test'), 2, (1, 8, 8)) == Size(292, 72, 2, (1, 8, 8))


@pytest.fixture(params=['as registered', 'found', 'uneven'])
def small(request, monkeypatch):
    "Somebody's own data set: twelve training and four test images of each of three classes, or of the smallest."
    dataset.names()
    monkeypatch.setattr(dataset, '_entries', dict(dataset._entries))
    counts = {split: torch.tensor([n, n, n + (30 if request.param == 'uneven' else 0)]) for split, n in (('train', 12), ('test', 4))}
    labels = {split: torch.arange(3).repeat_interleave(count) for split, count in counts.items()}
    pixels = {split: torch.randint(256, (len(part), 1, 8, 8), dtype=torch.uint8, generator=keyed_generator(split)) for split, part in labels.items()}
    notes = {'size': Size(36, 12, 3, (1, 8, 8))} if request.param == 'as registered' else {}

    @dataset.register(request.param.split()[0], context=('device',), **notes)
    def small(classes=None, per_class=None, test_per_class=None, held_out=0., device='cpu'):
        choice = {'classes': classes, 'per_class': per_class, 'test_per_class': test_per_class, 'held_out': held_out}
        return tensor_data_set(Facts('small', ['a', 'b', 'c'], (.5,), (.25,)), pixels, labels, **choice, device=device)
    return request.param.split()[0]


@pytest.mark.parametrize('name', PROFILES)
def test_a_profile_asks_a_small_data_set_for_no_more_than_it_has(small, name):
    chosen = dict(task_for(name, small).data_options)
    wanted = {'smoke': {'per_class': 12, 'test_per_class': 4, 'held_out': .1}, 'quick': {'per_class': 12, 'held_out': .25},
              'mini': {'held_out': .2}, 'paper': {}}[name]
    assert chosen == wanted
    data = dataset(small, **chosen)
    assert (data.size('train'), data.size('test')) == (size_of(small, chosen).train, size_of(small, chosen).test)


def test_a_small_data_set_runs(small, tmp_path):
    [task] = narrowed(profile('smoke'), data_sets=small).tasks
    plan, store = Plan.of([protected(task, 'ce', task.pairs[0][0], 0)]).check(), Store(tmp_path)
    assert execute(plan, store, Settings(device='cpu')) == []
    assert store.result(plan.runs[0])['accuracy'] > 0


def test_profiles_ask_large_data_sets_for_what_they_always_did():
    assert task_for('smoke', 'digits').data_options == {'per_class': 20, 'test_per_class': 10, 'held_out': .1}
    assert task_for('quick', 'imagenet').data_options == {'per_class': 40, 'held_out': .25, 'classes': 20}


# ---- every data set can be compared

def noise(seed=0, shape=(1, 4, 6)):
    "A data set without files."
    pixels = {split: torch.randint(256, (6, *shape), dtype=torch.uint8, generator=keyed_generator(seed, split)) for split in ('train', 'test')}
    return pixels, {split: torch.arange(6) % 2 for split in pixels}


def sums(pixels, labels, checksum=None):
    channels = pixels['train'].shape[1]
    return TensorDataSet(Facts('noise', ['a', 'b'], (.5,)*channels, (.5,)*channels, checksum=checksum), pixels, labels).checksum


@pytest.mark.parametrize('checksum', [None, {}])
def test_data_without_files_have_a_sum_of_each_split(checksum):
    found = sums(*noise(), checksum)
    assert list(found) == ['train pixels', 'test pixels'] and all(len(value) == 71 and value.startswith('sha256:') for value in found.values())
    assert found == sums(*noise(), checksum) and not set(found.values()) & set(sums(*noise(1)).values())
    for part in (0, 1): # pixels, labels
        for split in ('train', 'test'):
            changed = noise()
            changed[part][split][5] ^= 1
            assert [name for name, value in sums(*changed).items() if value != found[name]] == [f'{split} pixels']
    pixels, labels = noise()
    assert sums({split: part.view(6, 3, 4, 2) for split, part in pixels.items()}, labels) != found # the shape counts
    assert sums(pixels, {split: part.int() for split, part in labels.items()}) == found # the type of labels does not
    assert sums({split: part.transpose(0, 1).contiguous().transpose(0, 1) for split, part in pixels.items()}, labels) == found # nor the memory's order


def test_sums_of_files_are_kept(monkeypatch):
    monkeypatch.setattr('cmim_repro.lab.data.core._sum_of', lambda *_: pytest.fail('pixels are summed although there are sums of files'))
    assert sums(*noise(), {'train': 'sha256:0'}) == {'train': 'sha256:0'}
    assert sorted(dataset('digits').checksum) == ['test', 'train']
