"""What a learner computes in a team is what it computes alone: in any company, at any place, and after any interruption."""
from dataclasses import replace

import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid, keyed_generator
from cmim_repro.defenses.core import objective
from cmim_repro.experiments.runs import make_run
from cmim_repro.lab import fused
from cmim_repro.lab.data.core import Facts, TensorDataSet
from cmim_repro.lab.fused import Team, Teams, size_matters
from cmim_repro.lab.losses import Loss
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Checkpoint, Learner, Recipe, Settings, cpu_threads, initialised, place_all, train

RECIPE = Recipe(epochs=3, batch_size=32, lr=.05, schedule='cosine', nesterov=True, warmup_epochs=1, weight_decay=1e-2, augment='none', fused=4)
CPU = Settings(device='cpu')
OFTEN = Settings(device='cpu', checkpoint_seconds=0, inside_seconds=0)


@pytest.fixture(scope='module')
def data():
    facts = Facts('noise', [f'class {i}' for i in range(7)], (.5,), (.3,))
    images = torch.randint(256, (77, 1, 8, 8), dtype=torch.uint8, generator=keyed_generator(0, 'pictures'))
    labels = torch.arange(77) % 7 # batches of 32, 32 and 13 images
    return TensorDataSet(facts, {'train': images, 'test': images[:16]}, {'train': labels, 'test': labels[:16]})


def teacher(images):
    matrix = torch.randn(64, 7, generator=keyed_generator(1, 'teacher'))/4
    return (images.flatten(1) @ matrix).log_softmax(1)


def made(data, registry, name, seed=0, recipe=RECIPE, folder=None, network='cnn_tiny', **options):
    context = {'num_classes': 7, 'train_labels': data.labels('train'), 'seed': 0, 'image_shape': data.image_shape, 'class_names': data.class_names,
               'superclasses': None, 'wordnet_ids': None}
    loss = registry(name, **options, **{k: v for k, v in context.items() if k in registry.context(name)})
    net = initialised(lambda: model(network, num_classes=7, image_shape=data.image_shape), seed)
    return Learner(f'{name}{seed}', net, loss, recipe, folder=folder and folder/f'{name}{seed}')


def smoothed(data, count, **changes): return [made(data, objective, 'ls', seed, epsilon=.1*(seed or .5), **changes) for seed in range(count)]


def trained(learners, data, settings=CPU, **options):
    train(learners, data, 0, teacher, settings, **options)
    return learners


def tensors(one):
    kept = [state['momentum_buffer'] for state in one.optimizer.state.values() if 'momentum_buffer' in state]
    return [*one.model.state_dict().values(), *one.objective.state_dict().values(), *kept]


def same(one, other):
    assert one.history == other.history and (one.epoch, one.done) == (other.epoch, other.done)
    for a, b in zip(tensors(one), tensors(other), strict=True): assert torch.equal(a, b)


def in_teams(learners, data):
    "Sizes of the teams, largest first, and how many take ordinary steps."
    with Teams() as formed: movers = formed.of(place_all(learners, torch.device('cpu')), data)
    return sorted((len(one.learners) for one in movers if isinstance(one, Team)), reverse=True), sum(isinstance(one, Learner) for one in movers)


def streams():
    "All methods that train a student or a teacher, by the batches that they share."
    found = {}
    for registry, name in [*((objective, name) for name in objective.names()), *((attack, name) for name in attack.names())]:
        if not registry.note(name, 'trains', True): continue
        mixing = registry.options(name).get('mixing')
        found.setdefault(mixing, []).append((registry, name))
    return list(found.values())


@pytest.mark.parametrize('methods', streams(), ids=lambda methods: methods[0][1])
def test_every_method_alone_and_in_a_cohort(data, methods):
    cohort = [made(data, *method, seed) for seed, method in enumerate(methods)]
    assert in_teams(cohort, data)[1] == 0
    trained(cohort, data)
    for seed, method in enumerate(methods): same(trained([made(data, *method, seed)], data)[0], cohort[seed])


def test_no_place_and_no_company_matters(data):
    alone = [trained([one], data)[0] for one in smoothed(data, 9)]
    for chosen in ((8, 7, 6, 5, 4, 3, 2, 1, 0), (3, 1), (5, 0, 2), (2, 4, 6, 8, 1)):
        cohort = smoothed(data, 9)
        for i, one in zip(chosen, trained([cohort[i] for i in chosen], data), strict=True): same(one, alone[i])


def test_teams_are_about_equally_large(data):
    assert [in_teams(smoothed(data, count), data)[0] for count in (1, 4, 5, 9)] == [[1], [4], [3, 2], [3, 3, 3]]


def test_where_the_size_matters_teams_are_full(data, monkeypatch):
    places = []
    init = Team.__init__
    monkeypatch.setattr(Team, '__init__', lambda self, learners, count: (init(self, learners, count), places.append(count))[0])
    monkeypatch.setattr(fused, 'size_matters', lambda *arguments: True)
    assert in_teams(smoothed(data, 6), data)[0] == [4, 2] and set(places) == {4}
    cohort = trained(smoothed(data, 6), data)
    for one, other in zip(cohort, smoothed(data, 6), strict=True): same(one, trained([other], data)[0])


def test_the_size_is_tried(monkeypatch):
    net = model('cnn_tiny', num_classes=7, image_shape=(1, 8, 8))
    assert not size_matters(net, 3, [(5, 1, 8, 8)])
    answers = fused._answers
    monkeypatch.setattr(fused, '_answers', lambda net, size, images: [found + (size == 2)*1e-7 for found in answers(net, size, images)])
    assert size_matters(net, 3, [(6, 1, 8, 8)]) and not size_matters(net, 3, [(5, 1, 8, 8)]) # a shape is tried once


def test_two_threads(data):
    with cpu_threads(2):
        cohort = trained(smoothed(data, 5), data)
        for one, other in zip(cohort, smoothed(data, 5), strict=True): same(one, trained([other], data)[0])


class Stop(Exception): pass


@pytest.mark.parametrize('saved', [4, 9, 17])
def test_killed_inside_an_epoch_and_resumed(data, tmp_path, monkeypatch, saved):
    methods = [(objective, 'ls'), (attack, 'kd'), (attack, 'mkd'), (attack, 'amplified'), (attack, 'dist')]
    cohort = lambda folder=None: [made(data, *method, seed, folder=folder) for seed, method in enumerate(methods)]
    whole, count, save = trained(cohort(), data), [0], Checkpoint.save

    def stops(self, every=0.):
        save(self, every)
        count[0] += 1
        if count[0] == saved: raise Stop # some learners are one step ahead of what others have saved

    monkeypatch.setattr(Checkpoint, 'save', stops)
    with pytest.raises(Stop): trained(cohort(tmp_path), data, OFTEN)
    monkeypatch.setattr(Checkpoint, 'save', save)
    for one, other in zip(trained(cohort(tmp_path), data, OFTEN), whole, strict=True): same(one, other)


def test_a_checkpoint_is_that_of_an_ordinary_learner(data, tmp_path):
    for name, size in (('teams', 4), ('ordinary', 0)): trained(smoothed(data, 4, recipe=replace(RECIPE, epochs=1, fused=size), folder=tmp_path/name), data, OFTEN)
    files = [tmp_path/name/'ls1'/'checkpoint.pt' for name in ('teams', 'ordinary')]
    team, ordinary = (torch.load(file, weights_only=True) for file in files)
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 100 and team.keys() == ordinary.keys()
    assert {name: (t.shape, t.stride()) for name, t in team['model'].items()} == {name: (t.shape, t.stride()) for name, t in ordinary['model'].items()}
    assert team['optimizer']['param_groups'] == ordinary['optimizer']['param_groups'] and team['optimizer']['state'].keys() == ordinary['optimizer']['state'].keys()


class Breaks(Loss):
    "Cross-entropy that is no number from an epoch on."
    needs_epoch = True
    def loss(self, logits, teacher_log_probs, labels, epoch): return torch.nn.functional.cross_entropy(logits, labels)*(float('nan') if epoch else 1)


def test_who_diverges_leaves_the_others_as_they_were(data):
    cohort = smoothed(data, 4)
    cohort[1].objective = Breaks()
    trained(cohort, data)
    assert cohort[1].diverged and cohort[1].epoch == 1
    for i, other in enumerate(smoothed(data, 4)):
        if i != 1: same(cohort[i], trained([other], data)[0])


def test_recipes_are_kept_apart(data):
    other = replace(RECIPE, momentum=0., weight_decay=0., nesterov=False, lr=.02)
    make = lambda: [*smoothed(data, 2), *smoothed(data, 3, recipe=other)]
    assert in_teams(make(), data)[0] == [3, 2]
    for one, alone in zip(trained(make(), data), make(), strict=True): same(one, trained([alone], data)[0])


def test_close_to_ordinary_steps(data):
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    methods = [(objective, 'ls'), (attack, 'kd'), (attack, 'mkd'), (attack, 'htc')]
    teams, ordinary = ([made(data, *method, seed, recipe=replace(recipe, fused=size)) for seed, method in enumerate(methods)] for size in (4, 0))
    for one, other in zip(trained(teams, data), trained(ordinary, data), strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert not any(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True) if a.ndim == 4)


@pytest.mark.parametrize('changes, network', [({}, 'cnn_small'), ({}, 'resnet8'), ({'micro_batch': 16}, 'cnn_tiny'), ({'precision': 'bf16'}, 'cnn_tiny')])
def test_who_cannot_be_in_a_team_takes_ordinary_steps(data, changes, network):
    recipe = replace(RECIPE, epochs=1, **changes)
    asked, ordinary = (smoothed(data, 2, recipe=replace(recipe, fused=size), network=network) for size in (4, 0))
    assert in_teams(asked, data) == ([], 2)
    for one, other in zip(trained(asked, data), trained(ordinary, data), strict=True): same(one, other)


def test_the_option_and_the_identity():
    with pytest.raises(Invalid, match='fused is -1; it must be a whole number from 0'): Recipe(fused=-1)
    run, again, other = (make_run('digits', 'cnn_tiny', 'ce', recipe=Recipe(epochs=3, **options)) for options in ({}, {'fused': 0}, {'fused': 4}))
    assert run.id == again.id != other.id and 'fused' not in run.json and '"fused":4' in other.json


def test_a_team_ends_with_training(data):
    cohort = trained(smoothed(data, 3), data)
    for one in cohort:
        for tensor in tensors(one): assert tensor.nbytes == tensor.untyped_storage().nbytes()
    assert len({tensor.data_ptr() for one in cohort for tensor in tensors(one)}) == sum(len(tensors(one)) for one in cohort)
