"""Whatever is registered works: every attack, training method, release, network and data set, without a list of names."""
import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from cmim_repro.attacks.core import attack
from cmim_repro.core import Invalid, Unusable
from cmim_repro.defenses.core import objective, release
from cmim_repro.experiments.tasks import data_sets
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.losses import Loss
from cmim_repro.lab.models.core import model, sketch
from cmim_repro.report.paper import label

B, C = 12, 6
LABELS = torch.arange(B) % C
FACTS = {'num_classes': C, 'seed': 0, 'image_shape': (1, 8, 8), 'class_names': [f'class {i}' for i in range(C)],
         'superclasses': [i // 2 for i in range(C)], 'wordnet_ids': None, 'train_labels': torch.arange(8*C) % C}

IMAGES = SimpleNamespace(take=lambda split, indices, augment, key: indices) # the network of the test looks its answers up


def every(registry):
    "All entries of a registry in all their variants."
    return [pytest.param(name, variant, id=f'{name}-{variant}') for name in registry.names() for variant in registry.variants(name)]


def made(registry, name, variant='recommended'):
    given = {key: FACTS[key] for key in registry.context(name) if key in FACTS}
    return registry(name, variant, **given)


def scores(key): return 2*torch.randn(B, C, generator=torch.Generator().manual_seed(key))


@pytest.mark.parametrize('registry, name, variant', [
    pytest.param(registry, *param.values, id=param.id) for registry in (attack, objective) for param in every(registry)])
def test_a_loss_is_a_finite_number_with_a_finite_gradient(registry, name, variant):
    loss, logits = made(registry, name, variant), scores(0).requires_grad_()
    batch = SimpleNamespace(labels=LABELS, indices=torch.arange(B), epoch=0, step=0, seed=0, shares=(), augment='none')
    assert isinstance(loss, Loss)
    loss.start_epoch(0)
    loss.before_step(lambda images: scores(2)[images % B].log_softmax(1), IMAGES, batch)
    loss.observe(logits.detach().log_softmax(1), LABELS, torch.arange(B))
    value = loss(logits, scores(1).log_softmax(1) if loss.needs_teacher else None, LABELS, epoch=3)
    value.backward()
    assert value.ndim == 0 and math.isfinite(value.item()) and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize('registry, name', [pytest.param(r, n, id=n) for r in (attack, objective) for n in r.names()])
def test_a_loss_says_what_is_missing(registry, name):
    loss = made(registry, name)
    if loss.needs_teacher:
        with pytest.raises(Invalid, match='teacher_log_probs'): loss(scores(0), None, LABELS, epoch=0)
    if loss.needs_labels:
        with pytest.raises(Invalid, match='labels'):
            loss(scores(0), scores(1).log_softmax(1) if loss.needs_teacher else None, None, epoch=0)


@pytest.mark.parametrize('registry, name', [pytest.param(r, n, id=f'{r.what}-{n}') for r in (attack, objective, release) for n in r.names()])
def test_a_method_without_the_facts_of_its_task_works_or_names_what_is_missing(registry, name):
    try: registry(name)
    except Invalid as error: assert any(fact in str(error) for fact in registry.context(name)), error


@pytest.mark.parametrize('name, variant', every(release))
def test_a_release_answers_with_distributions(name, variant):
    made_release = made(release, name, variant).eval()
    images = torch.rand(B, *FACTS['image_shape'], generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): answers = made_release(scores(0).log_softmax(1), images)
    assert answers.shape == (B, C) and not answers.isnan().any() and (answers <= 1e-6).all()
    assert torch.allclose(answers.exp().sum(1), torch.ones(B), atol=1e-5)


@pytest.mark.parametrize('name', release.names())
def test_a_release_says_that_it_is_fitted(name):
    "Execution goes by the note."
    assert bool(release.note(name, 'fitted')) == hasattr(release.entry(name), 'fit')


def shape_for(name):
    "Images that the network takes."
    for shape in ((3, 32, 32), (3, 64, 64), (3, 224, 224), (1, 8, 8)):
        try: return shape if sketch(name, num_classes=C, image_shape=shape) else None
        except Invalid: continue
    raise AssertionError(f'{name} takes images of no usual shape')


@pytest.mark.parametrize('name', model.names())
def test_a_network_has_a_logit_for_each_class(name):
    shape = shape_for(name)
    if math.prod(shape) > 3*64*64: pytest.skip('too large for every test run; see tests/test_models.py')
    net = model(name, num_classes=C, image_shape=shape).eval()
    with torch.no_grad(): logits = net(torch.zeros(2, *shape))
    assert logits.shape == (2, C) and logits.isfinite().all()


@pytest.mark.parametrize('name', data_sets())
def test_a_data_set_has_the_size_that_it_is_registered_with(name, tmp_path):
    context = dataset.context(name)
    place = {key: value for key, value in {'root': tmp_path, 'download': False}.items() if key in context}
    try: data = dataset(name, **place)
    except Unusable: pytest.skip('its files are not here; see tests/test_data.py')
    size = dataset.note(name, 'size')
    assert size is None or (data.size('train'), data.size('test'), data.num_classes, tuple(data.image_shape)) == (
        size.train, size.test, size.classes, tuple(size.image_shape))
    images, labels, places = next(iter(data.batches('train', 8)))
    assert images.shape == (8, *data.image_shape) and images.isfinite().all() and len(labels) == len(places) == 8
    assert 0 <= int(labels.min()) <= int(labels.max()) < data.num_classes


@pytest.mark.parametrize('registry', [attack, objective, release, model, dataset], ids=lambda registry: registry.what)
def test_everything_has_a_label_and_a_docstring(registry):
    for name in registry.names():
        assert label(name).strip(), name
        assert inspect.getdoc(registry.entry(name)), name
