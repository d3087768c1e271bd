"Data sets: properties of the batches, hostile and damaged files, downloads, and (with CMIM_TEST_DATA) the real files."
import functools
import hashlib
import http.server
import math
import os
import pickle
import signal
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmim_repro.core import Invalid, Unusable, keyed_generator
from cmim_repro.lab.data.cifar100 import read_pickle
from cmim_repro.lab.data.core import (
    Crop,
    Facts,
    Flip,
    Rotation,
    TensorDataSet,
    augmented,
    batch_places,
    chosen_samples,
    dataset,
    fetch,
    random_crop,
    random_rotation,
    rank_share,
    step_count,
)
from cmim_repro.lab.data.imagenet import _Files

REAL = os.environ.get('CMIM_TEST_DATA')
real = pytest.mark.skipif(not REAL, reason='CMIM_TEST_DATA does not name a folder with the real data sets')


def noise(*shape, seed=0): return torch.randint(256, shape, dtype=torch.uint8, generator=keyed_generator(seed, 'noise'))


def drawn(device='cpu', count=70):
    "A data set of noise with every kind of augmentation."
    facts = Facts('noise', [f'class {i}' for i in range(5)], (.4, .5, .6), (.2, .3, .25),
                  (Rotation(20), Crop(3, 'edge'), Crop(2), Flip()))
    return TensorDataSet(facts, {'train': noise(count, 3, 20, 16), 'test': noise(11, 3, 20, 16, seed=1)},
                         {'train': torch.arange(count) % 5, 'test': torch.arange(11) % 5}, device)


# ---- augmentation

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 12), st.integers(2, 12), st.integers(0, 5),
       st.sampled_from(['constant', 'edge']))
def test_crop_is_torchvisions(count, channels, height, width, padding, mode):
    images = noise(count, channels, height, width)
    offsets = Crop(padding).draw(count, keyed_generator(count, height, width))
    plain = [TF.crop(TF.pad(image, padding, padding_mode=mode), int(y), int(x), height, width)
             for image, (y, x) in zip(images, offsets, strict=True)]
    assert torch.equal(random_crop(images, padding, offsets, mode), torch.stack(plain))


EXACT = [math.degrees(math.atan2(y, x)) for y, x in ((3, 4), (5, 12), (1, 2), (2, 3), (1, 1), (1, 0), (0, -1))] # many ties


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.floats(-180, 180, width=32), st.sampled_from(EXACT)), st.integers(4, 40), st.integers(4, 40))
def test_rotation_is_torchvisions(angle, height, width):
    "Wherever the source, in float64, is farther from the middle between two pixels than float32 rounds."
    images = noise(2, 3, height, width)
    y, x = (torch.arange(n).double() - (n - 1)/2 for n in (height, width))
    cos, sin = (f(math.radians(angle)) for f in (math.cos, math.sin))
    source = torch.stack([x*sin + y[:, None]*cos + (height - 1)/2, x*cos - y[:, None]*sin + (width - 1)/2])
    clear = (source.remainder(1) - .5).abs().amin(0) > 1e-4 # coordinates are below 100, and float32 has 2**-24
    same = random_rotation(images, torch.tensor([angle, angle], dtype=torch.float32)) == TF.rotate(images, angle)
    assert same[..., clear].all()


def test_crop_offsets_cover_their_range_evenly():
    counts = torch.bincount(Crop(4).draw(90_000, keyed_generator(0)).flatten(), minlength=9)
    assert len(counts) == 9 and (counts / 20_000 - 1).abs().max() < .04
    assert abs(Flip().draw(90_000, keyed_generator(0)).float().mean() - .5) < .01
    angles = Rotation(20).draw(90_000, keyed_generator(0))
    assert -20 <= angles.min() < -19.9 and 19.9 < angles.max() <= 20 and angles.mean().abs() < .2


# ---- batches

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 5))
def test_every_image_once_and_two_for_every_process(count, batch_size, world):
    if min(count, batch_size) < world:
        with pytest.raises(Invalid, match='cannot be shared'): step_count(count, batch_size, world)
        return
    batches = list(batch_places(torch.arange(count), batch_size, world))
    assert torch.cat(batches).tolist() == list(range(count)) and len(batches) == step_count(count, batch_size, world)
    for batch in batches:
        shares = [batch[rank_share(len(batch), rank, world)] for rank in range(world)]
        assert torch.equal(torch.cat(shares), batch)
        if min(count, batch_size) >= 2 * world: assert min(map(len, shares)) >= 2


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_one_stream(world):
    data = drawn()
    options = {'augment': 'standard', 'shuffle': True, 'seed': 5, 'epoch': 2}
    alone = list(data.batches('train', 16, **options))
    ranks = [list(data.batches('train', 16, rank=rank, world=world, **options)) for rank in range(world)]
    assert len(alone) == len(ranks[0]) == data.steps('train', 16, world)
    for step, one in enumerate(alone):
        for part in range(3): assert torch.equal(torch.cat([r[step][part] for r in ranks]), one[part])


@pytest.mark.parametrize('rank, world', [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize('augment, shuffle', [('standard', True), ('none', False)])
def test_a_broken_off_epoch_goes_on_from_any_step(augment, shuffle, rank, world):
    options = {'augment': augment, 'shuffle': shuffle, 'seed': 4, 'epoch': 7, 'rank': rank, 'world': world}
    whole = list(drawn().batches('train', 16, **options))
    for start in range(len(whole) + 1):
        same_batches(drawn().batches('train', 16, start=start, **options), whole[start:])


def same_batches(found, expected):
    found = list(found)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_leave_the_global_generator_alone():
    data = drawn()
    before = torch.get_rng_state()
    list(data.batches('train', 16, augment='standard', shuffle=True))
    data.take('train', [1, 2], augment='standard', key=(1,))
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_does_not_depend_on_the_one_before():
    data = drawn()
    batches = list(data.batches('train', 16, augment='standard', shuffle=True, seed=9, epoch=1))
    images, _, places = batches[2]
    assert torch.equal(images, data.take('train', places, augment='standard', key=(9, 'augment', 1, 2)))
    assert not torch.equal(images, data.take('train', places, augment='standard', key=(9, 'augment', 1, 3)))


@pytest.mark.parametrize('call,message', [
    (lambda d: d.batches('train', 0), 'batch_size is 0; it must be a whole number from 1'),
    (lambda d: d.batches('train', 2.5), 'batch_size is 2.5'),
    (lambda d: d.batches('training', 4), "Unknown split 'training'; accepted: train, held_out, test"),
    (lambda d: d.batches('held_out', 4), 'The held_out part of noise is empty; give held_out'),
    (lambda d: d.batches('train', 4, augment='mixup'), "Unknown augmentation 'mixup'; accepted: none, standard"),
    (lambda d: d.batches('train', 4, rank=-1), 'rank is -1; it must be a whole number from 0 up to 0'),
    (lambda d: d.batches('train', 16, start=6), 'start is 6; it must be a whole number from 0 up to 5'),
    (lambda d: d.batches('train', 16, start=-1), 'start is -1'),
    (lambda d: d.take('train', [70]), 'Positions run from 70 to 70; the train part of noise has 70 images'),
    (lambda d: d.take('train', [-1]), 'Positions run from -1 to -1'),
])
def test_bad_requests_are_one_sentence(call, message):
    with pytest.raises(Invalid) as refusal: call(drawn())
    assert message in str(refusal.value) and '\n' not in str(refusal.value)


@pytest.mark.parametrize('images,labels,message', [
    (torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), 'type torch.float32; they must be uint8 of shape'),
    (noise(4, 8, 8), torch.zeros(4).long(), r'shape \(4, 8, 8\)'),
    (noise(4, 3, 8, 8), torch.zeros(3).long(), 'they must be 4 whole numbers'),
    (noise(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]), 'labels run from 0 to 2; there are 2 classes'),
    (noise(4, 3, 8, 8), torch.tensor([0, -1, 1, 1]), 'labels run from -1 to 1'),
])
def test_images_and_labels_must_fit(images, labels, message):
    with pytest.raises(Invalid, match=message):
        TensorDataSet(Facts('bad', ['a', 'b'], (.5,) * 3, (.5,) * 3), {'train': images}, {'train': labels})


# ---- splits

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 30), st.floats(0, .9), st.integers(0, 5))
def test_splits_are_stratified_and_disjoint(classes, each, held_out, seed):
    labels, names = torch.arange(classes * each) % classes, [f'c{i}' for i in range(classes)]
    places = chosen_samples(labels, labels, range(classes), names, held_out=held_out, split_seed=seed)
    assert sorted(places['train'].tolist() + places['held_out'].tolist()) == list(range(len(labels)))
    counts = labels[places['held_out']].bincount(minlength=classes)
    assert len(counts.unique()) == 1 and (counts[0] > 0) == (held_out > 0) and counts[0] < each
    if each > 3: assert abs(float(counts[0]) - held_out * each) <= 1


def test_held_out_does_not_depend_on_the_other_classes():
    few, many = (dataset('digits', classes=c, held_out=.1) for c in (['three', 'eight'], None))
    def pictures(data, label):
        images = data._images['held_out'][data.labels('held_out') == label]
        return {bytes(image) for image in images.flatten(1).numpy()}

    assert pictures(few, 0) == pictures(many, 3) and pictures(few, 1) == pictures(many, 8)


# ---- hostile and damaged pickles

class Calls:
    "A pickle that calls a function when it is read."
    def __init__(self, function, *arguments): self.function, self.arguments = function, arguments
    def __reduce__(self): return self.function, self.arguments


@pytest.mark.parametrize('function,arguments,name', [
    (os.system, ('true',), 'posix.system'), (eval, ('1',), 'eval'), (getattr, (1, 'real'), 'getattr'),
                                                     (Path, ('/',), 'Path'),
    (np.load, ('x.npy',), 'numpy.load'), (torch.load, ('x.pt',), 'load'), (bytearray, (3,), 'bytearray')])
@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_a_pickle_runs_nothing(function, arguments, name, protocol):
    with pytest.raises(Unusable) as refusal:
        read_pickle('train', pickle.dumps({'data': Calls(function, *arguments)}, protocol))
    assert name in str(refusal.value) and 'was not run' in str(refusal.value) and '\n' not in str(refusal.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content):
    try: assert isinstance(read_pickle('train', content), dict)
    except Unusable as refusal: assert str(refusal).startswith('train ')


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(data):
    content = bytearray(pickle.dumps({'data': np.arange(24, dtype=np.uint8).reshape(2, 12), 'fine_labels': [1, 2]},
                                     data.draw(st.sampled_from([2, 4, 5]))))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try: record = read_pickle('train', bytes(content))
    except Unusable as refusal: assert str(refusal).startswith('train ')
    else: assert isinstance(record, dict)


@pytest.fixture
def cifar(tmp_path):
    "Files in CIFAR-100's layout, two images a class."
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    labels = [i % 100 for i in range(200)]
    for part in ('train', 'test'):
        record = {'data': noise(200, 3072).numpy(), 'fine_labels': labels, 'coarse_labels': [i // 5 for i in labels],
                  'filenames': ['x.png'] * 200}
        (folder / part).write_bytes(pickle.dumps(record, 4))
    meta = {'fine_label_names': [f'f{i}' for i in range(100)], 'coarse_label_names': [f'c{i}' for i in range(20)]}
    (folder / 'meta').write_bytes(pickle.dumps(meta, 2))
    return tmp_path


def test_unverified_files_need_permission(cifar, monkeypatch):
    monkeypatch.delenv('CMIM_ALLOW_UNVERIFIED', raising=False)
    with pytest.raises(Unusable) as refusal: dataset('cifar100', root=cifar)
    assert 'train has the md5 sum' in str(refusal.value) and '-p allow_unverified True' in str(refusal.value)
    monkeypatch.setenv('CMIM_ALLOW_UNVERIFIED', '1')
    assert not dataset('cifar100', root=cifar).verified


@pytest.mark.parametrize('file', ['train', 'test', 'meta'])
@pytest.mark.parametrize('keep', [0, 1, 50, -1])
def test_truncated_files_are_named(cifar, file, keep):
    path = cifar / 'cifar-100-python' / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Unusable) as refusal: dataset('cifar100', root=cifar, allow_unverified=True)
    assert str(path) in str(refusal.value) and 'is damaged' in str(refusal.value) and '\n' not in str(refusal.value)


def test_a_folder_in_place_of_a_file(cifar):
    (cifar / 'cifar-100-python' / 'meta').unlink()
    (cifar / 'cifar-100-python' / 'meta').mkdir()
    with pytest.raises(Unusable, match='has no meta'): dataset('cifar100', root=cifar, allow_unverified=True)


# ---- downloads

@pytest.fixture
def server(tmp_path):
    "(address, sum, list of requests) of a small web server with one archive."
    (tmp_path / 'site').mkdir()
    (tmp_path / 'inside.txt').write_text('here')
    with tarfile.open(tmp_path / 'site' / 'a.tar', 'w') as tar: tar.add(tmp_path / 'inside.txt', 'inside.txt')
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): asked.append(self.path)

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                         functools.partial(Quiet, directory=str(tmp_path / 'site'))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        total = hashlib.md5((tmp_path / 'site' / 'a.tar').read_bytes()).hexdigest()
        yield f'http://127.0.0.1:{running.server_address[1]}/a.tar', total, asked
        running.shutdown()


def test_several_processes_fetch_once(server, tmp_path):
    url, total, asked = server
    target = tmp_path / 'new'
    threads = [threading.Thread(target=fetch, args=(url, 'a.tar', total, target, (target / 'inside.txt').exists))
               for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert (target / 'inside.txt').read_text() == 'here'
    assert len(asked) <= 2 # torchvision may ask for redirections first


def test_an_archive_with_another_sum_is_not_unpacked(server, tmp_path):
    with pytest.raises(Unusable, match='a.tar could not be fetched'):
        fetch(server[0], 'a.tar', '0' * 32, tmp_path / 'new', lambda: False)
    assert not (tmp_path / 'new' / 'inside.txt').exists()


# ---- ImageNet's layout

@pytest.fixture
def tree(tmp_path):
    "Two classes of 20 training and 20 validation images of noise, as a folder tree."
    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        for wnid in ('n01', 'n02'):
            (tmp_path / part / wnid).mkdir(parents=True)
            for i in range(20):
                Image.fromarray(rng.integers(0, 256, (40, 50, 3),
                                             dtype=np.uint8)).save(tmp_path / part / wnid / f'{i:02}.JPEG')
    return tmp_path


def test_streamed_images_do_not_depend_on_workers(tree):
    before = torch.get_rng_state()
    streams = [list(dataset('imagenet', root=tree, image_size=32,
                            workers=workers).batches('train', 18, augment='standard', shuffle=True))
               for workers in (0, 1, 2)]
    assert torch.equal(before, torch.get_rng_state()) and len(streams[0]) == 3
    for other in streams[1:]: same_batches(other, streams[0])


@pytest.mark.parametrize('rank, world', [(0, 1), (1, 2)])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_broken_off_epoch_of_streamed_images_goes_on_from_any_step(tree, workers, rank, world):
    data = dataset('imagenet', root=tree, image_size=16, workers=workers)
    options = {'augment': 'standard', 'shuffle': True, 'seed': 4, 'epoch': 7, 'rank': rank, 'world': world}
    whole = list(data.batches('train', 9, **options))
    for start in range(len(whole) + 1): same_batches(data.batches('train', 9, start=start, **options), whole[start:])


def test_images_of_steps_that_are_skipped_are_not_read(tree):
    data = dataset('imagenet', root=tree, image_size=16, workers=0)
    for i in range(20):
        (tree / 'train' / 'n01' / f'{i:02}.JPEG').unlink() # the first half of an epoch that is not shuffled
    assert len(list(data.batches('train', 10, start=2))) == 2
    with pytest.raises(Unusable, match='00.JPEG is missing'): next(data.batches('train', 10))


def flatten(tree):
    "The validation images as the published archive has them: all in one folder."
    for image in sorted((tree / 'val').rglob('*.JPEG')):
        image.rename(tree / 'val' / f'{image.parent.name}_{image.name}')
    for folder in filter(Path.is_dir, list((tree / 'val').iterdir())): folder.rmdir()


def change(tree, what):
    "Damage a tree in one way; returns what the sentence must say."
    train, val = tree / 'train' / 'n02' / '03.JPEG', tree / 'val' / 'n01' / '05.JPEG'
    if what in ('truncated in train', 'truncated in val'):
        path = train if 'train' in what else val
        path.write_bytes(path.read_bytes()[:400])
        return f'{path} is not a readable image'
    if what == 'text':
        val.write_text('no image at all')
        return f'{val} is not a readable image (of no known kind)'
    if what == 'no bytes':
        train.write_bytes(b'')
        return f'{train} is not a readable image'
    if what == 'empty class folder':
        for image in (tree / 'train' / 'n02').iterdir(): image.unlink()
        return f"{tree / 'train' / 'n02'} holds no images"
    if what in ('class missing in val', 'class missing in train'):
        path = tree / what.split()[-1] / 'n02'
        for image in path.iterdir(): image.unlink()
        path.rmdir()
        return f'{path} is missing: train and val must have the same class folders'
    if what == 'flat val':
        flatten(tree)
        return f"{tree / 'val'} has no class folders; arrange it with torchvision.datasets.ImageNet"
    (tree / 'val').rename(tree / 'validation')
    return f'{tree} has no folder val'


DAMAGE = ['truncated in train', 'truncated in val', 'text', 'no bytes', 'empty class folder', 'class missing in val',
          'class missing in train', 'flat val', 'no val']


@pytest.mark.parametrize('what', DAMAGE)
@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_tree_is_one_sentence_that_names_the_file(tree, what, workers):
    if workers and what not in DAMAGE[:3]: pytest.skip('is found before any image is read')
    words = change(tree, what)
    with pytest.raises(Unusable) as refusal:
        data = dataset('imagenet', root=tree, image_size=16, workers=workers)
        for split in ('train', 'test'): list(data.batches(split, 18))
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def killed_at(place, made=_Files.__getitem__):
    "Reading an image that ends the worker process, as the kernel does when memory runs out."
    def read(self, i):
        if i == place: os.kill(os.getpid(), signal.SIGKILL)
        return made(self, i)
    return read


def test_a_worker_that_dies_is_one_sentence(tree, monkeypatch):
    monkeypatch.setattr(_Files, '__getitem__', killed_at(25))
    data = dataset('imagenet', root=tree, image_size=16, workers=2)
    with pytest.raises(Unusable, match='A process that reads images for this one was ended from outside') as refusal:
        list(data.batches('train', 10))
    assert '\n' not in str(refusal.value)


def test_an_error_inside_a_worker_is_not_taken_for_its_death(tree, monkeypatch):
    for kind in (RuntimeError, FileNotFoundError):
        def fail(self, i, kind=kind): raise kind('a mistake of our own')
        monkeypatch.setattr(_Files, '__getitem__', fail)
        with pytest.raises(kind, match='a mistake of our own'):
            list(dataset('imagenet', root=tree, image_size=16, workers=2).batches('train', 10))


def test_a_file_that_may_not_be_read_is_named(tree, monkeypatch):
    def refuse(path, *_): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr('PIL.Image.open', refuse)
    with pytest.raises(Unusable, match='00.JPEG is not a readable image .*Permission denied'):
        next(dataset('imagenet', root=tree, workers=0).batches('train', 10))


def test_readers_that_give_nothing_end_with_a_sentence(tree, monkeypatch):
    monkeypatch.setattr('cmim_repro.lab.data.imagenet._LONGEST', 1)
    monkeypatch.setattr('cmim_repro.lab.data.imagenet.open_image', lambda *_: time.sleep(3600))
    with pytest.raises(Unusable, match='or gave none for .* minutes, .*/dev/shm'):
        next(dataset('imagenet', root=tree, workers=2).batches('train', 10))


def test_names_that_are_not_utf8(tree):
    "A file's is part of a sum only; a folder's becomes a class, which tables show."
    os.rename(os.fsencode(tree / 'train' / 'n01' / '03.JPEG'), os.fsencode(tree / 'train' / 'n01') + b'/caf\xe9.JPEG')
    data = dataset('imagenet', root=tree, workers=0)
    assert len(next(data.batches('train', 40))[0]) == 40 and data.checksum['train'].startswith('sha256:')
    for part in ('train', 'val'): os.rename(tree / part / 'n02', os.fsencode(tree / part) + b'/caf\xe9')
    with pytest.raises(Unusable, match='has a name that cannot be shown; rename it') as said: dataset('imagenet', root=tree)
    str(said.value).encode()


# ---- TinyImageNet's layout

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "Two classes of TinyImageNet, four training and two validation images each, some grey."
    monkeypatch.setenv('CMIM_DATA', str(tmp_path / 'downloads'))
    rng, folder, notes = np.random.default_rng(0), tmp_path / 'tiny-imagenet-200', []

    def save(path, grey):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64) if grey else (64, 64, 3), dtype=np.uint8)).save(path)

    for wnid in ('n01', 'n02'):
        for i in range(4): save(folder / 'train' / wnid / 'images' / f'{wnid}_{i}.JPEG', i == 0)
        for i in range(2):
            save(folder / 'val' / 'images' / f'val_{wnid}_{i}.JPEG', i == 1)
            notes.append(f'val_{wnid}_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n')
    (folder / 'wnids.txt').write_text('n01\nn02\n')
    (folder / 'words.txt').write_text('n01\tgoldfish\nn02\tpole\n')
    (folder / 'val' / 'val_annotations.txt').write_text(''.join(notes))
    return folder


def test_grey_images_have_three_equal_channels(tiny):
    data = dataset('tinyimagenet', root=tiny)
    equal = [bool((x == x[:1]).all()) for x in data._images['train']]
    assert equal == [True, False, False, False] * 2 and data._images['train'].shape == (8, 3, 64, 64)


def cut(path): path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize('damage, words', [
    (lambda f: (f / 'val' / 'val_annotations.txt').unlink(),
     'val_annotations.txt cannot be read (No such file or directory)'),
    (lambda f: (f / 'val' / 'images' / 'val_n02_1.JPEG').write_bytes(b'text'),
     'val_n02_1.JPEG is not a readable image (of no known kind)'),
    (lambda f: cut(f / 'val' / 'images' / 'val_n02_1.JPEG'), 'val_n02_1.JPEG is not a readable image'),
    (lambda f: cut(f / 'train' / 'n01' / 'images' / 'n01_2.JPEG'), 'n01_2.JPEG is not a readable image'),
    (lambda f: [path.unlink() for path in (f / 'train' / 'n02' / 'images').iterdir()],
     'train/n02 holds no images'),
    (lambda f: (f / 'train' / 'n02').rename(f / 'train' / 'n03'),
     'the class folders of train must be those of wnids.txt'),
    (lambda f: (f / 'val' / 'images').rename(f / 'val' / 'pictures'), 'val/images cannot be read'),
    (lambda f: Image.new('RGB', (63, 64)).save(f / 'train' / 'n01' / 'images' / 'n01_1.JPEG'),
     'n01_1.JPEG has 63 by 64 pixels; it must have 64 by 64'),
])
def test_a_damaged_tinyimagenet_is_one_sentence_that_names_the_file(tiny, damage, words):
    damage(tiny)
    with pytest.raises(Unusable) as refusal: dataset('tinyimagenet', root=tiny)
    assert words in str(refusal.value) and '\n' not in str(refusal.value)


def packed(tiny, monkeypatch):
    "The folder as an archive in the downloads folder, its sum taken for the published one."
    archive = tiny.parent / 'downloads' / 'tiny-imagenet-200.zip'
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, 'w') as found:
        for path in sorted(tiny.rglob('*')): found.write(path, path.relative_to(tiny.parent))
    monkeypatch.setattr('cmim_repro.lab.data.tinyimagenet._MD5', hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def test_unpacking_that_was_killed_begins_again_and_verified_counts_the_images(tiny, monkeypatch):
    archive = packed(tiny, monkeypatch)
    folder, write = archive.parent / 'tiny-imagenet-200', zipfile.ZipFile._extract_member
    class Killed(BaseException): pass

    def killed(self, member, *words):
        if getattr(member, 'filename', member).endswith('n02_3.JPEG'): raise Killed
        return write(self, member, *words)
    with monkeypatch.context() as changed, pytest.raises(Killed):
        changed.setattr(zipfile.ZipFile, '_extract_member', killed)
        dataset('tinyimagenet')
    assert not folder.exists()
    whole = dataset('tinyimagenet')
    assert whole.size('train') == 8 and whole.verified and archive.exists() and not list(archive.parent.glob('*.part'))
    (folder / 'train' / 'n02' / 'images' / 'n02_3.JPEG').unlink() # as an earlier version may have left it
    part = dataset('tinyimagenet')
    assert part.size('train') == 7 and not part.verified


def test_a_broken_archive_is_one_sentence(tiny, monkeypatch):
    archive = packed(tiny, monkeypatch)
    (archive.parent / 'tiny-imagenet-200').mkdir()
    for path in tiny.iterdir(): path.rename(archive.parent / 'tiny-imagenet-200' / path.name)
    archive.write_bytes(b'PK\x03\x04 cut off')
    monkeypatch.setattr('cmim_repro.lab.data.tinyimagenet._MD5', hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(Unusable, match='tiny-imagenet-200.zip cannot be read'): dataset('tinyimagenet')


def test_augmented_draws_for_the_whole_batch():
    images, steps = noise(9, 3, 8, 8), [Rotation(10), Crop(1), Flip()]
    whole = augmented(images, steps, keyed_generator(1))
    assert torch.equal(whole[4:7], augmented(images[4:7], steps, keyed_generator(1), 9, slice(4, 7)))


# ---- the real files

@real
def test_real_cifar100():
    data = dataset('cifar100', root=REAL, allow_unverified=True)
    assert [data.size('train'),
            data.size('test')] == [50_000, 10_000] and data.labels('train').bincount().tolist() == [500] * 100
    pixels = data._images['train'].double() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.mean).double(), atol=1e-6)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.std).double(), atol=1e-5)
    groups = {data.superclass_names[g]: [n for n, h in zip(data.class_names, data.superclasses, strict=True) if h == g]
              for g in range(20)}
    assert groups['aquatic_mammals'] == ['beaver', 'dolphin', 'otter', 'seal', 'whale']


@real
def test_real_tinyimagenet(tmp_path, monkeypatch):
    monkeypatch.setenv('CMIM_DATA', str(tmp_path))
    data = dataset('tinyimagenet', root=REAL)
    assert data.size('train') == 500 * data.num_classes and data.size('test') == 50 * data.num_classes
    assert data.labels('test').bincount().tolist() == [50] * data.num_classes
    again = dataset('tinyimagenet', root=REAL)
    assert again.checksum == data.checksum and torch.equal(again._images['test'], data._images['test'])


@real
def test_real_imagenet():
    data = dataset('imagenet', root=Path(REAL) / 'imagenet', per_class=20, test_per_class=4)
    images, labels, _ = next(data.batches('train', 32, augment='standard', shuffle=True))
    assert images.shape == (32, 3, 224, 224) and 0 < images.std() < 3 and len(labels.unique()) > 3
