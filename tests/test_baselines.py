"Releases that hide the network for nothing, and those with nothing to teach: by hand, their properties, and as runs in a store."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from test_releases_properties import answers, is_distribution

from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid
from cmim_repro.defenses.core import changes, release
from cmim_repro.experiments.execution import answers_of, execute, load_data, released
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.paper import label
from cmim_repro.theory.cmi import cmi

quick = settings(max_examples=40, deadline=None)
NAMES = ('top1', 'rounding', 'centroid', 'uniform', 'shuffled')
SHAPE = (1, 4, 4)
CPU = Settings(device='cpu')


def made(name, classes, known=None, **options):
    "A release, fitted if it can be."
    facts = {'num_classes': classes, 'image_shape': SHAPE, 'seed': 0}
    module = release(name, **options, **{fact: facts[fact] for fact in release.context(name)})
    if known is not None and hasattr(module, 'fit'): module.fit(known)
    return module


def drawn(count, classes, key=0, dtype=torch.float64):
    "Log-probabilities (count, classes) and images."
    random = torch.Generator().manual_seed(key)
    return (3*torch.randn(count, classes, generator=random, dtype=dtype)).log_softmax(-1), torch.randn(count, *SHAPE, generator=random)


# ---- by hand

def probs(rows): return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize('name, options, asked, expected', [
    ('top1', {}, [.2, .5, .3], [0, 1, 0]),
    ('top1', {}, [.4, .4, .2], [1, 0, 0]), # the first of equals, as argmax
    ('top1', {'epsilon': .6}, [.2, .5, .3], [.2, .6, .2]),
    ('rounding', {}, [.216, .5, .284], [.22, .5, .28]),
    ('rounding', {'digits': 1}, [.17, .58, .25], [.2, .6, .2]), # a half goes to the even digit
    ('rounding', {'digits': 1}, [.44, .26, .26, .04], [.4, .3, .3, 0]),
    ('rounding', {'digits': 1}, [.64, .12, .12, .12], [6/9, 1/9, 1/9, 1/9]),
    ('rounding', {'digits': 1}, [.41, .43, .16], [.4/1.0001, .4001/1.0001, .2/1.0001]), # a tie
    ('rounding', {'digits': 1}, [.04]*24 + [.0401]*1 + [-0.], [0]*24 + [1, 0]), # nothing left
    ('uniform', {}, [.2, .5, .3], [1/3, 1/3, 1/3])])
def test_an_answer_by_hand(name, options, asked, expected):
    asked = probs([asked])
    log_probs = (asked/asked.sum()).log() if name != 'rounding' else asked.log()
    answered = made(name, asked.shape[1], **options)(log_probs)
    torch.testing.assert_close(answered.exp(), probs([expected]))


def test_centroids_by_hand():
    module = made('centroid', 4, probs([[.6, .2, .2, 0], [.5, .1, .1, .3], [.9, .1, 0, 0], [0, .4, .6, 0]]).log())
    asked = probs([[.4, .3, .2, .1], [.1, .2, .3, .4], [.1, .1, .7, .1], [.1, .5, .2, .2]]).log()
    expected = probs([[2/3, .4/3, .1, .1], [0, 0, 0, 1], [0, .4, .6, 0], [0, 1, 0, 0]]) # of the last nothing was seen
    torch.testing.assert_close(module(asked).exp(), expected)


def test_a_second_fit_forgets_the_first():
    one, other = (drawn(30, 4, key)[0] for key in (0, 1))
    asked, images = drawn(50, 4, 2)
    for name in ('centroid', 'shuffled'):
        twice = made(name, 4, one)
        twice.fit(other[other.argmax(-1) > 0])
        assert torch.equal(twice(asked, images), made(name, 4, other[other.argmax(-1) > 0])(asked, images)), name


def test_shuffled_by_hand():
    "The place of an answer, from the sum in the notebook in Python's own numbers."
    known, _ = drawn(40, 3)
    asked, images = drawn(20, 3, 1)
    module = made('shuffled', 3, known, kept=5)
    answered = module(asked, images)
    for row, log_probs, image in zip(answered, asked, images, strict=True):
        total = sum(int(weight)*round(64*float(pixel)) for weight, pixel in zip(module.weights, image.flatten(), strict=True))
        place = total % (2**31 - 1) % 5
        torch.testing.assert_close(row, module.answers[log_probs.argmax(), place].double().log_softmax(-1))


# ---- properties

@quick
@given(answers(), answers())
def test_what_is_fitted_answers_with_distributions_and_keeps_the_label(known, asked):
    if known.shape[1] != asked.shape[1]: known = known[:, :1].expand_as(asked[:1].expand(len(known), -1)).log_softmax(-1)
    images = torch.randn(len(asked), *SHAPE, generator=torch.Generator().manual_seed(0))
    for name in ('centroid', 'shuffled'):
        answered = made(name, asked.shape[1], known)(asked, images)
        is_distribution(answered, 1e-6)
        top = asked.argmax(-1, keepdim=True)
        assert (answered.gather(-1, top) >= answered.max(-1, keepdim=True).values - 1e-6).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('classes', [2, 10, 100])
def test_all_but_uniform_keep_every_label(classes, dtype):
    known, _ = drawn(60*classes, classes, 0, dtype)
    asked, images = drawn(2000, classes, 1, dtype)
    for name, options in (*((name, {}) for name in NAMES), ('rounding', {'digits': 1}), ('top1', {'epsilon': .9})):
        answered = made(name, classes, known, **options)(asked, images)
        assert answered.dtype == dtype
        assert (changes(answered, asked)['top-1 changed'] == 0) == (name != 'uniform'), name


@pytest.mark.parametrize('alpha', [.1, .25, 1., 4.])
def test_cmi_is_zero_where_the_answer_depends_on_the_predicted_class_alone(alpha):
    "Whatever the image: given the class that is predicted, which is the true one where the network is right."
    known, _ = drawn(500, 10)
    asked, images = drawn(800, 10, 1)
    predicted = asked.argmax(-1)
    for name in ('top1', 'centroid', 'uniform'): assert abs(cmi(made(name, 10, known)(asked, images), predicted, alpha)) < 1e-12
    assert cmi(asked, predicted, alpha) > .01 and cmi(made('shuffled', 10, known)(asked, images), predicted, alpha) > .01


def test_shuffled_answers_are_the_networks_own_and_tell_nothing_about_the_image():
    known, _ = drawn(5000, 4)
    module = made('shuffled', 4, known, kept=500)
    asked, images = drawn(5000, 4, 1)
    answered, predicted = module(asked, images), asked.argmax(-1)
    among = {tuple(row) for row in known.float().log_softmax(-1).mul(1e4).round().long().tolist()}
    assert sum(tuple(row) in among for row in answered.float().mul(1e4).round().long().tolist()) > .99*len(answered)
    for index in range(4): # what is left of the answer to the image itself, inside a class: no correlation
        own, heard = (x[predicted == index][:, (index + 1) % 4] for x in (asked, answered))
        assert abs(torch.corrcoef(torch.stack([own, heard]))[0, 1]) < 4/len(own)**.5
    places = torch.tensor([(module.answers[p].double().log_softmax(-1) - row).abs().sum(-1).argmin() for p, row in zip(predicted, answered, strict=True)])
    assert places.bincount(minlength=500).max() < 40 # 10 of each are expected


def test_shuffled_answers_depend_on_seed_and_image_but_not_on_the_batch():
    known, _ = drawn(400, 5)
    asked, images = drawn(64, 5, 1)
    module = made('shuffled', 5, known)
    together, order = module(asked, images), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(asked[order], images[order]), together[order])
    assert torch.equal(torch.cat([module(asked[i:i + 1], images[i:i + 1]) for i in range(64)]), together)
    assert (module(asked, images + 1e-7) == together).all(-1).double().mean() > .95 # the last bit decides nothing
    moved = module(asked, images.roll(1, -1))
    assert not torch.equal(moved, together) and torch.equal(moved.argmax(-1), together.argmax(-1))
    other = release('shuffled', num_classes=5, image_shape=SHAPE, seed=1)
    other.fit(known)
    assert not torch.equal(other(asked, images), together)


def test_kd_from_uniform_answers_is_label_smoothing():
    logits, labels = drawn(30, 7)[0].requires_grad_(), torch.arange(30) % 7
    heard = made('uniform', 7)(drawn(30, 7, 1)[0])
    for weight in (.1, .5, .9):
        kd = attack('kd', weight=weight, temperature=1.)(logits, heard, labels)
        smoothed = F.cross_entropy(logits, labels, label_smoothing=weight)
        torch.testing.assert_close(kd + weight*math.log(7), smoothed) # the entropy of what is heard is a constant
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (kd, smoothed)))


@pytest.mark.parametrize('variant', ['recommended', 'authors', 'paper'])
@pytest.mark.parametrize('name', attack.names())
def test_every_attack_bears_them(name, variant):
    "Exact zeros, ties and constants: the loss and its gradient are finite."
    if variant not in attack.variants(name): pytest.skip('it has no such variant')
    known, _ = drawn(60, 6, 0, torch.float32)
    asked, images = drawn(12, 6, 1, torch.float32)
    facts = {'num_classes': 6, 'seed': 0, 'train_labels': torch.arange(12) % 6, 'image_shape': SHAPE}
    for arm in NAMES:
        loss = attack(name, variant, **{fact: facts[fact] for fact in attack.context(name) if fact in facts})
        logits = drawn(12, 6, 2, torch.float32)[0].requires_grad_()
        loss.observe(logits.detach().log_softmax(1), torch.arange(12) % 6, torch.arange(12))
        value = loss(logits, made(arm, 6, known)(asked, images), torch.arange(12) % 6, epoch=3)
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all(), arm


@pytest.mark.parametrize('name, options, message', [
    ('top1', {'epsilon': 1}, 'epsilon is 1; it must be a number from 0 below 1'),
    ('top1', {'epsilon': -.1}, 'epsilon is -0.1; it must be a number from 0 below 1'),
    ('rounding', {'digits': 0}, 'digits is 0; it must be a whole number from 1 up to 9'),
    ('rounding', {'digits': 2.5}, 'digits is 2.5; it must be a whole number from 1 up to 9'),
    ('shuffled', {'kept': 0, 'num_classes': 3, 'image_shape': SHAPE}, 'kept is 0; it must be a whole number from 1'),
    ('shuffled', {'image_shape': SHAPE}, 'num_classes is None; it must be a whole number from 2'),
    ('centroid', {}, 'num_classes is None; it must be a whole number from 2'),
    ('uniform', {'epsilon': .1}, "Unknown option of release 'uniform' 'epsilon'; accepted: none")])
def test_bad_options_are_refused_in_a_sentence(name, options, message):
    with pytest.raises(Invalid) as refusal: release(name, **options)
    assert str(refusal.value).startswith(message) and '\n' not in str(refusal.value)


def test_shuffled_answers_need_their_images():
    asked, images = drawn(4, 3)
    for wrong in (None, images[:, :, :2]):
        with pytest.raises(Invalid, match='give images of 16 pixels each'): made('shuffled', 3)(asked, wrong)


def test_tables_call_them_by_a_name():
    assert [label(name) for name in NAMES] == ['Top-1', 'Rounding', 'Centroid', 'Uniform', 'Shuffled']


# ---- as runs

COMMON = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 20, 'test_per_class': 10, 'held_out': .2}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
ARMS = {name: make_run('digits', 'cnn_tiny', name, teacher=TEACHER, data_options=COMMON['data_options']) for name in NAMES}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A store with a teacher, its five releases and a student of each of two, one with queries of its own."
    store = Store(tmp_path_factory.mktemp('arms'))
    students = [make_run('digits', 'cnn_tiny', 'kd', teacher=ARMS['centroid'], **COMMON),
                make_run('digits', 'cnn_tiny', 'knockoff', teacher=ARMS['shuffled'], budget=40, **COMMON)]
    plan = Plan.of([*ARMS.values(), *students]).check()
    assert execute(plan, store, CPU) == [] and all(map(store.finished, plan.runs))
    return store


def test_a_fitted_release_answers_from_the_training_images(done):
    data = load_data(TEACHER)
    known = released(answers_of(TEACHER, done, data), data, 'train')
    own, _ = done.log_probs(TEACHER)
    images = data.take('test', range(data.size('test')))
    for name, run in ARMS.items():
        module = release(name, **run.options, **{fact: {'num_classes': 10, 'image_shape': (1, 8, 8), 'seed': 0}[fact] for fact in release.context(name)})
        if hasattr(module, 'fit'): module.fit(known)
        torch.testing.assert_close(done.log_probs(run)[0], module(own, images))
        assert (done.folder(run)/'weights.safetensors').exists() == hasattr(module, 'fit')
        assert done.result(run)['accuracy'] == (.1 if name == 'uniform' else done.result(TEACHER)['accuracy'])


def test_what_was_fitted_does_not_depend_on_who_asks(done):
    "A thief with fewer images, or with other queries, hears the answers that everybody hears."
    data = load_data(TEACHER)
    few = load_data(make_run('digits', 'cnn_tiny', 'ce', **{**COMMON, 'data_options': {**COMMON['data_options'], 'per_class': 5}}))
    for name in ('centroid', 'shuffled'):
        one, other = (released(answers_of(ARMS[name], done, own), own, 'test') for own in (data, few))
        torch.testing.assert_close(one, other)
