"""A folder of images as a data set of its own: through profile, plan, training and the thief's part, with no line of training code for it."""
import numpy as np
import pytest
from PIL import Image

from cmim_repro.core import Invalid, Unusable
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.runs import Plan, make_run, run_from_dict
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.tasks import Task, smoke_task, thief_data
from cmim_repro.lab.data import core
from cmim_repro.lab.data.core import dataset, size_of
from cmim_repro.lab.training import Recipe
from cmim_repro.report.results import results_frame, student_entries


def tree(root, counts, size=(10, 8), levels=(40, 120, 200)):
    "Noisy grey squares, a class for each level."
    rng = np.random.default_rng(0)
    for name, level in zip(counts, levels, strict=False):
        (root/name).mkdir(parents=True)
        for i in range(counts[name]):
            Image.fromarray((level + rng.normal(0, 25, size[::-1])).clip(0, 255).astype(np.uint8)).save(root/name/f'{i:02}.png')
    return root


@pytest.fixture(autouse=True)
def nothing_remembered(): core._found.cache_clear() # the sizes of folders that other tests have made


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('CMIM_DATA', str(tmp_path))
    return tree(tmp_path/'folder', {'dark': 30, 'grey': 30, 'light': 30})


def test_a_folder_goes_through_a_whole_profile(home, tmp_path):
    chosen = narrowed(profile('smoke'), data_sets='folder', attacks='kd', defenses='st', seeds=1, overrides='epochs=3')
    entries, store = student_entries(chosen), Store(tmp_path/'store')
    task = chosen.tasks[0]
    assert task.data == 'folder' and size_of('folder', task.data_options).classes == 3
    assert execute(Plan.of([e.run for e in entries]).check(), store) == []
    found = results_frame(entries, store)
    assert found['last'].notna().all() and found['last'].max() > 60 # of 100; 33 by chance
    assert store.result(entries[0].run)['data']['checksum'].keys() == {'train', 'held_out', 'test'}


def test_a_thief_has_a_part_of_the_owners_images(home):
    task = Task('folder', (('cnn_small', 'cnn_tiny'),), Recipe(), Recipe(), {'held_out': .25}, thief_images=.5)
    owner, thief = dataset('folder', **task.data_options), dataset('folder', **task.student_data)
    images = lambda data, *splits: {image.numpy().tobytes() for s in splits for image in data.pictures(data.take(s, range(data.size(s))))}
    both = [dataset('folder', **options, mean=[0., 0., 0.], std=[1., 1., 1.]) for options in (task.data_options, task.student_data)]
    assert thief.size('train') + thief.size('held_out') == 36 and owner.size('test') == thief.size('test') == 18
    assert images(both[1], 'train', 'held_out') <= images(both[0], 'train', 'held_out') and images(both[1], 'held_out') <= images(both[0], 'held_out')
    assert owner.checksum['test'] == thief.checksum['test']


def test_test_images_are_no_training_images_and_do_not_depend_on_other_options(home):
    tests = {dataset('folder', **options).checksum['test'] for options in ({}, {'held_out': .4}, {'per_class': 5})}
    assert len(tests) == 1
    data = dataset('folder', classes=['light', 'dark'])
    assert data.class_names == ['light', 'dark'] and (data.size('train'), data.size('test')) == (48, 12)
    pixels = data.pictures(data.take('test', range(12)))[:, 0].mean((1, 2))
    assert (pixels[data.labels('test') == 0] > .6).all() and (pixels[data.labels('test') == 1] < .4).all()


def test_its_run_is_described_completely(home):
    run = make_run('folder', 'cnn_tiny', 'ce', data_options={'image_size': 8, 'mean': [.5]*3, 'std': [.25]*3})
    assert run_from_dict(run.to_dict()) == run and run.data_options['std'] == [.25]*3 and run.data_options['path'] is None


def test_a_task_without_the_folder_says_where_it_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv('CMIM_DATA', str(tmp_path/'nowhere'))
    with pytest.raises(Unusable, match='nowhere/folder is not a folder; name one that holds images with path'): smoke_task('folder')


def test_images_that_do_not_fit_into_memory_are_refused(home):
    with pytest.raises(Invalid, match='take 27.0 GB in memory, more than 8; choose a smaller image_size'): dataset('folder', image_size=10_000)


def test_thief_data_of_a_folder_counts_its_smallest_class(home):
    tree(home, {'few': 10}, levels=(10,))
    assert thief_data('folder', {'split_seed': 1}, .5)['per_class'] == 4 # of eight that are not for testing
