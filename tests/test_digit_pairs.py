"Pairs of digits: the same bytes everywhere, no digit in two splits, as many images as were asked for."
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from cmim_repro.core import Invalid
from cmim_repro.experiments.runs import make_run
from cmim_repro.experiments.store import _reached, _root, code_digest
from cmim_repro.lab.data.core import SPLITS, dataset, size_of
from cmim_repro.lab.data.digit_pairs import _pairs

SMALL = {'digits': 3, 'per_class': 4, 'test_per_class': 2, 'held_out': .25}


def pairs(**options): return dataset('digit_pairs', **options)
def present(data): return [split for split in SPLITS if data.size(split)]


def pixels(data, split):
    "All images of a split, bytes (N, 8, 16)."
    return data.pictures(data.take(split, range(data.size(split)))).mul(255).round().to(torch.uint8)[:, 0]


def digest(data):
    total = hashlib.sha256()
    for split in present(data): total.update(pixels(data, split).numpy().tobytes() + data.labels(split).numpy().tobytes())
    return total.hexdigest()


def halves(data, split):
    "The single digits of each image, as bytes: two lists."
    whole = pixels(data, split)
    return [[bytes(half.flatten().numpy()) for half in part] for part in (whole[..., :8], whole[..., 8:])]


def test_every_process_draws_the_same_bytes():
    code = f'from test_digit_pairs import digest, pairs; print(digest(pairs(**{SMALL!r})))'
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '2', 'PYTHONHASHSEED': '7'}
    there = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert digest(pairs(**SMALL)) == there == '8e802029ed3e96b25278ffd7fa2b48b9369ecc341171a73db9e0c8e1ba02bc72'


def test_each_option_changes_the_images_and_the_global_generator_has_no_part_in_them():
    before = torch.get_rng_state()
    plain = digest(pairs(**SMALL))
    assert torch.equal(before, torch.get_rng_state())
    changes = ({'noise': .2}, {'split_seed': 1}, {'per_class': 5}, {'test_per_class': 3}, {'held_out': 0.}, {'digits': 4}, {'classes': 3})
    assert len({plain, *(digest(pairs(**{**SMALL, **change})) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize('held_out, split_seed', [(0., 0), (.25, 0), (.5, 3)])
def test_no_digit_is_in_two_splits(held_out, split_seed):
    data = pairs(noise=0, held_out=held_out, split_seed=split_seed, per_class=60, test_per_class=40)
    found = {split: set().union(*halves(data, split)) for split in present(data)}
    for split, own in found.items(): assert not own & set().union(*(other for name, other in found.items() if name != split))


def test_test_digits_are_the_same_for_every_seed_and_part():
    "So that no teacher's training image is another run's test image."
    tested = set().union(*(set().union(*halves(pairs(noise=0, split_seed=seed, held_out=part, test_per_class=60), 'test'))
                           for seed, part in ((0, 0.), (1, .3), (2, .6))))
    trained = set().union(*(set().union(*halves(pairs(noise=0, split_seed=seed, held_out=part), split))
                            for seed, part in ((0, 0.), (1, .3), (2, .6)) for split in ('train', 'held_out') if part or split == 'train'))
    assert len(tested) == 359 and not tested & trained


def test_an_image_shows_the_digits_that_its_class_names():
    found = load_digits()
    known = {}
    for image, digit in zip(found.images, found.target, strict=True):
        known.setdefault(bytes(torch.from_numpy(image).mul(255/16).round().to(torch.uint8).flatten().numpy()), set()).add(int(digit))
    data = pairs(noise=0, held_out=.25)
    for split in present(data):
        for left, right, label in zip(*halves(data, split), data.labels(split).tolist(), strict=True):
            tens, ones = map(int, data.class_names[label])
            assert tens in known[left] and ones in known[right] and data.superclasses[label] == tens


def test_no_pair_is_there_twice():
    data = pairs(noise=0, per_class=100, test_per_class=100, held_out=.2)
    for split in present(data):
        seen = Counter(zip(*halves(data, split), data.labels(split).tolist(), strict=True))
        assert max(seen.values()) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(2, 12), st.integers(1, 9), st.sampled_from([0., .1, .25, .5, .9]))
def test_it_is_as_large_as_registered_and_each_class_has_the_same_share(digits, per_class, test_per_class, held_out):
    options = {'digits': digits, 'per_class': per_class, 'test_per_class': test_per_class, 'held_out': held_out}
    data, size = pairs(**options), size_of('digit_pairs', options)
    assert [data.size(split) for split in SPLITS] == [getattr(size, split) for split in SPLITS]
    assert data.size('train') + data.size('held_out') == digits**2*per_class and data.num_classes == size.classes == digits**2
    for split in present(data): assert len(data.labels(split).bincount(minlength=digits**2).unique()) == 1


def test_sizes_of_chosen_classes():
    for classes in (7, ['99', '00', '37'], [4, 50]):
        for held_out in (0., .3):
            options = {'classes': classes, 'per_class': 9, 'held_out': held_out}
            data, size = pairs(**options), size_of('digit_pairs', options)
            assert [data.size(split) for split in SPLITS] == [getattr(size, split) for split in SPLITS] and data.num_classes == size.classes


def test_more_images_and_other_classes_leave_an_image_alone():
    few, many = pairs(classes=['31', '07'], per_class=8, test_per_class=3), pairs(per_class=20, test_per_class=9)
    for split, count in (('train', 8), ('test', 3)):
        for place, name in enumerate(few.class_names):
            whole = pixels(many, split)[many.labels(split) == many.class_names.index(name)]
            assert torch.equal(pixels(few, split)[few.labels(split) == place], whole[:count])


def test_teacher_and_student_with_other_options_normalise_alike_and_have_one_sum():
    "A student with fewer images asks a teacher that was trained on more."
    one, other = pairs(), pairs(digits=4, per_class=5, noise=.4, held_out=.5, split_seed=3)
    assert (one.mean, one.std, one.checksum, one.verified) == (other.mean, other.std, other.checksum, True)


def test_noise_has_the_spread_that_is_asked_for():
    grey = torch.full((20, 1, 8, 8), 128.)
    for noise in (0, .05, .1):
        made = _pairs(grey, grey, 400, noise, '00', ('spread',)).double()
        assert abs(made.mean() - 128) < .5 and abs(made.std() - 255*noise) < .01*255*noise + .3
    assert (_pairs(grey, grey, 400, 2., '00', ('spread',)).unique().aminmax()) == (0, 255)


def test_pairs_by_hand():
    "With all pairs wanted, each left digit stands beside each right one."
    lefts, rights = (torch.arange(count).mul(step).float().view(-1, 1, 1, 1) for count, step in ((2, 100), (3, 7)))
    made = _pairs(lefts, rights, 6, 0, '00', ('by hand',))
    assert made.shape == (6, 1, 1, 2) and made.dtype == torch.uint8
    assert sorted(map(tuple, made.view(6, 2).tolist())) == [(0, 0), (0, 7), (0, 14), (100, 0), (100, 7), (100, 14)]


@pytest.mark.parametrize('options, message', [
    ({'digits': 1}, 'digits is 1; it must be a whole number from 2 up to 10'),
    ({'digits': 11}, 'digits is 11; it must be a whole number from 2 up to 10'),
    ({'digits': 2.5}, 'digits is 2.5; it must be a whole number from 2 up to 10'),
    ({'noise': -.1}, 'noise is -0.1; it must be a number from 0'),
    ({'noise': float('nan')}, 'noise is nan; it must be a number from 0'),
    ({'per_class': 0}, 'per_class is 0; it must be a whole number from 1'),
    ({'per_class': None}, 'per_class is None; it must be a whole number from 1'),
    ({'per_class': 1, 'held_out': .2}, 'per_class is 1; it must be a whole number from 2'),
    ({'test_per_class': '3'}, "test_per_class is '3'; it must be a whole number from 1"),
    ({'held_out': 1.}, 'held_out is 1.0; it must be a number from 0 below 1'),
    ({'split_seed': -1}, 'split_seed is -1; it must be a whole number from 0'),
    ({'classes': 1}, 'classes is 1; it must be a whole number from 2 up to 100'),
    ({'classes': ['00', '100']}, "Unknown class '100'; accepted: 00, 01"),
    ({'digits': 2, 'classes': ['00', '22']}, "Unknown class '22'; accepted: 00, 01, 10, 11."),
    ({'digits': 2, 'per_class': 30_000}, "30000 images of class '00' are wanted; its 142 left and 142 right digits make only 20164 different pairs"),
    ({'digits': 2, 'per_class': 900, 'held_out': .02}, "18 images of class '00' are wanted; its 3 left and 3 right digits make only 9"),
    ({'colour': 1}, "Unknown option of data set 'digit_pairs' 'colour'")])
def test_bad_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(Invalid) as refusal: pairs(**options)
    assert str(refusal.value).startswith(message) and '\n' not in str(refusal.value)


def test_the_code_of_single_digits_is_part_of_a_runs_digest():
    run = make_run('digit_pairs', 'cnn_tiny', 'ce')
    reached = _reached(tuple(_root(dataset.entry('digit_pairs'))))
    names = {name for _, name in reached}
    assert {'digit_pairs', '_pairs', '_by_digit', 'digits', '_divided', '_bundled'} <= names and len(code_digest(run)) == 16
