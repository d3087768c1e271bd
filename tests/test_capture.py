"""A recorded step is the step: replays with all that Python knew at the time of the recording give the bits of steps that simply run."""
import weakref

import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import keyed_generator
from cmim_repro.defenses.core import objective
from cmim_repro.lab.capture import Captured, _Take
from cmim_repro.lab.data.core import Crop, Facts, Flip, TensorDataSet
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Learner, Recipe, Settings, initialised, train

METHODS = [(registry, name, {}) for registry in (objective, attack) for name in registry.names()]
METHODS += [(objective, 'cmim', {'centroids': kind}) for kind in ('batch', 'resample')] + [(attack, 'dkd', {'warmup_epochs': 3}), (attack, 'mkd', {'transform': 'repo'})]


class Replayed:
    "Stands for a CUDA graph: repeats the work as it was when it was recorded, whatever Python has changed since."
    def __init__(self, learner, inputs):
        self.learner, self.inputs, self.batch, self.sums = learner, inputs, learner.batch, learner.sums
        self.replays = 0

    def replay(self):
        learner, self.replays = self.learner, self.replays + 1
        known = learner.batch, learner.sums
        learner.batch, learner.sums = self.batch, self.sums
        learner.work(*self.inputs)
        learner.batch, learner.sums = known


def pictures(count=72):
    facts = Facts('noise', [f'class {i}' for i in range(8)], (.4, .5, .6), (.2, .3, .25), (Crop(3, 'edge'), Flip()))
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=keyed_generator(0, 'pictures'))
    labels = torch.arange(count) % 8
    return TensorDataSet(facts, {'train': images, 'test': images[:16]}, {'train': labels, 'test': labels[:16]})


def trained(data, registry, name, options, settings, network='cnn_tiny'):
    context = {'num_classes': 8, 'train_labels': data.labels('train'), 'seed': 0, 'image_shape': data.image_shape, 'class_names': data.class_names,
               'superclasses': None, 'wordnet_ids': None}
    loss = registry(name, **options, **{k: v for k, v in context.items() if k in registry.context(name)})
    net = initialised(lambda: model(network, num_classes=8, image_shape=data.image_shape), 0)
    # the last batch is smaller: 72 = 32 + 32 + 8
    one = Learner(name, net, loss, Recipe(epochs=5, batch_size=32, lr=.05, schedule='cosine', warmup_epochs=1))
    matrix = torch.randn(3*16*16, 8, generator=keyed_generator(1, 'teacher'))/20
    train([one], data, 0, lambda images: (images.flatten(1) @ matrix).log_softmax(1), settings)
    return one


@pytest.fixture
def recordings(monkeypatch):
    found = []

    def record(take, work, lane):
        take.graph = Replayed(work.__self__, take.inputs)
        found.append(take.graph)

    plain = Captured.__init__

    def made(self, *args, **options):
        plain(self, *args, **options)
        self.records = self.active
    monkeypatch.setattr(_Take, 'record', record)
    monkeypatch.setattr(Captured, '__init__', made)
    return found


@pytest.mark.parametrize('registry, name, options', METHODS, ids=lambda v: v if isinstance(v, str) else '')
def test_replays_are_steps(registry, name, options, recordings):
    data = pictures()
    plain = trained(data, registry, name, options, Settings(device='cpu', capture=False))
    assert not recordings
    replayed = trained(data, registry, name, options, Settings(device='cpu'))
    assert sum(r.replays for r in recordings) >= 4 # of fifteen steps; a loss that changes with the epoch is recorded anew in each
    for key, value in plain.model.state_dict().items(): assert torch.equal(value, replayed.model.state_dict()[key]), key
    for key, value in plain.objective.state_dict().items(): assert torch.equal(value, replayed.objective.state_dict()[key]), key
    assert plain.history == replayed.history


def test_random_numbers_of_a_replay_are_keyed(recordings):
    "VGG's dropout."
    data = pictures()
    plain, replayed = (trained(data, objective, 'ce', {}, Settings(device='cpu', capture=capture), 'vgg8') for capture in (False, True))
    assert recordings and plain.history == replayed.history


def test_what_cannot_be_recorded_runs_and_says_so_once(monkeypatch):
    def refuse(take, work, lane): raise RuntimeError('operation not permitted when stream is capturing\nmore')
    monkeypatch.setattr(_Take, 'record', refuse)
    seen = []
    one = Captured(lambda x: seen.append(float(x.sum())), torch.device('cpu'))
    one.records = True
    with pytest.warns(UserWarning, match='cannot be recorded .* runs as it is: operation not permitted') as said:
        for i in range(5): one(torch.tensor([float(i)]))
    assert seen == [0, 1, 2, 3, 4] and len(said) == 1 and not one.records


def test_a_void_recording_stays_until_the_next_one_is_there(monkeypatch):
    "Two changes of the key, with a shape that is too new to be recorded: CUDA takes a lane's memory back with its last recording."
    made = []

    class Graph:
        def replay(self): pass

    def record(take, work, lane): take.graph = Graph(); made.append(weakref.ref(take.graph))
    monkeypatch.setattr(_Take, 'record', record)
    one = Captured(lambda x: None, torch.device('cpu'))
    one.records = True
    for _ in range(3): one(torch.ones(3), key=0)
    one(torch.ones(2), key=1)
    one(torch.ones(2), key=2)
    assert len(made) == 1 and made[0]() is not None
    one(torch.ones(3), key=2)
    assert len(made) == 2 and made[0]() is None and made[1]() is not None
