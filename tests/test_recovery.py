"The thief who undoes the release: the loss number by number, what it learns, its state, and as a run in a store."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmim_repro.attacks.core import attack, soft_kl
from cmim_repro.attacks.recovery import Restorer, fit_restorer, own_release, release_pairs, shadow_of
from cmim_repro.core import Invalid
from cmim_repro.defenses.core import release
from cmim_repro.defenses.ls import EPSILONS
from cmim_repro.experiments.cost import operations
from cmim_repro.experiments.execution import answers_of, execute, load_data, make_method, released
from cmim_repro.experiments.profiles import attacked, narrowed, profile, protected
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.training import Learner, Recipe, Settings, train
from cmim_repro.report.paper import ATTACKS, label
from cmim_repro.theory.distributions import power_transform

FAST = {'shadow': 'cnn_tiny', 'shadow_epochs': 2, 'steps': 20, 'hidden': 16}
CPU = Settings(device='cpu')


def rows(count, C, key=0, scale=2.):
    return (scale*torch.randn(count, C, generator=torch.Generator().manual_seed(key), dtype=torch.float64)).log_softmax(1)


def thief_for(C, **options): return attack('recovery', num_classes=C, releases=release, **options)


def drawn(C, key=0):
    "A thief whose restorer has random weights, as if it had learnt them."
    thief = thief_for(C, against='rsp', hidden=5)
    random = torch.Generator().manual_seed(key)
    for parameter in thief.restorer.parameters(): torch.nn.init.normal_(parameter, generator=random)
    thief.restorer.double().ready = True
    return thief


# The formulas again, in plain numbers.

def soft(scores):
    raised = [math.exp(s - max(scores)) for s in scores]
    return [r/sum(raised) for r in raised]


def restored(p, layers):
    logs = [math.log(x) if x > 0 else math.log(min(x for x in p if x > 0)) - 5 for x in p]
    centred = [x - sum(logs)/len(logs) for x in logs]
    values = [x/4 for x in centred]
    for i, (weight, bias) in enumerate(layers):
        values = [b + sum(w*v for w, v in zip(line, values, strict=True)) for line, b in zip(weight, bias, strict=True)]
        if i < 2: values = [max(v, 0) for v in values]
    return soft([c + 8*math.tanh(v/8) for c, v in zip(centred, values, strict=True)])


def by_hand(logits, answers, labels, layers, weight, temperature):
    total = 0.
    for z, p, y in zip(logits, answers, labels, strict=True):
        target = soft([math.log(x)/temperature for x in restored(p, layers)])
        model = soft([s/temperature for s in z])
        total -= (1 - weight)*math.log(soft(z)[y])
        total += weight*temperature**2*sum(t*math.log(t/m) for t, m in zip(target, model, strict=True))
    return total/len(logits)


@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('C, weight, temperature', [(3, .9, 4), (10, .5, 1), (6, 1, .5), (4, 0, 2)])
def test_the_loss_number_by_number(C, weight, temperature, zeros):
    thief, answers, logits = drawn(C), rows(7, C, 1), 3*rows(7, C, 2)
    thief.weight, thief.temperature = weight, temperature
    if zeros: answers = answers.masked_fill(answers < answers.median(1, keepdim=True).values, -torch.inf).log_softmax(1)
    labels = torch.arange(7) % C
    layers = [(layer.weight.tolist(), layer.bias.tolist()) for layer in thief.restorer.perceptron[::2]]
    expected = by_hand(logits.tolist(), answers.exp().tolist(), labels.tolist(), layers, weight, temperature)
    assert thief(logits, answers, labels).item() == pytest.approx(expected, rel=1e-9)


@given(key=st.integers(0, 999), C=st.integers(2, 12), scale=st.floats(.1, 50))
@settings(max_examples=30, deadline=None)
def test_what_is_restored_is_a_distribution_near_the_answer(key, C, scale):
    thief, answers = drawn(C, key), rows(6, C, key, scale)
    found = thief.restored(answers)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6, dtype=torch.float64))
    assert found.isfinite().all() and not found.requires_grad
    change = found - answers
    assert (change.amax(1) - change.amin(1)).max() <= 16 + 1e-9 # each class moves by at most eight nats


@given(key=st.integers(0, 999), T=st.floats(.5, 8), w=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_the_null_arm_is_kd(key, T, w):
    logits, answers, labels = 2*rows(5, 4, key), rows(5, 4, key + 1), torch.arange(5) % 4
    options, victim = {'weight': w, 'temperature': T}, make_run('digits', 'cnn_tiny', 'ce')
    expected = attack('kd', **options)(logits, answers, labels)
    for null in ({'against': 'identity'}, {}, {'victim': victim}, {'against': 'identity', 'victim': protects('rsp')}):
        assert torch.equal(thief_for(4, **options, **null)(logits, answers, labels), expected)


@pytest.mark.parametrize('name', ['power', 'rsp'])
def test_an_invertible_release_is_undone(name):
    made = (lambda x: power_transform(x, .4)) if name == 'power' else release('rsp')
    honest = rows(3000, 8).float()
    answers, restorer = made(honest), Restorer(8)
    fit_restorer(restorer, answers[:2000], honest[:2000])
    before, after = (soft_kl(honest[2000:], x[2000:]) for x in (answers, restorer(answers)))
    assert after < .1*before


# On a data set: the shadow, its release, the pairs.

@pytest.fixture(scope='module')
def digits(): return dataset('digits', per_class=60, test_per_class=20)


@pytest.fixture(scope='module')
def shadow(digits): return shadow_of(digits, 'cnn_tiny', 6, seed=3)


def protects(name, teacher=None):
    return make_run('digits', 'cnn_tiny', name, teacher=teacher or make_run('digits', 'cnn_tiny', 'ce'), recipe=None)


@pytest.mark.parametrize('name, factor', [('rsp', .5), ('mad', .5), ('st', 1.)]) # of ten classes ST answers one
def test_answers_of_a_victim_come_nearer_to_the_honest_ones(name, factor, digits):
    "Of another network than the shadow, on images that neither has seen; the thief does not know MAD's surrogate."
    options = release.options(name, **({'surrogate': 'cnn_tiny'} if name == 'mad' else {}))
    victim = shadow_of(digits, 'cnn_small', 10, seed=8)
    images = digits.take('test', torch.arange(200))
    honest = victim.log_probs(images)
    answers = own_release(release, name, options, None, digits, victim, seed=8)(honest, images)
    thief = thief_for(10, shadow_epochs=10, victim=make_run(
        'digits', 'cnn_tiny', name, teacher=make_run('digits', 'cnn_tiny', 'ce'), **options))
    thief.before_step(None, digits, None)
    found = [power_transform(x, temperature=4) for x in (honest, thief.restored(answers), Restorer(10)(answers))]
    assert soft_kl(found[0], found[1]) < factor*soft_kl(found[0], found[2])


@pytest.mark.parametrize('name', [name for name in release.names() if name != 'identity'])
def test_pairs_of_any_release(name, digits, shadow):
    options = release.options(name, **({'surrogate': 'cnn_tiny'} if name == 'mad' else {}))
    recipe = Recipe(epochs=1, batch_size=64) if release.note(name, 'recipe') else None
    made = own_release(release, name, options, recipe, digits, shadow, seed=1)
    answers, honest = release_pairs(made, digits, shadow, seed=1)
    assert answers.shape == honest.shape == (4*600, 10) and not answers.requires_grad and not made.training
    for log_probs in (answers, honest): torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2400))


def test_honest_answers_are_the_shadows_at_powers_from_a_half_to_two(digits, shadow):
    _, honest = release_pairs(release('identity'), digits, shadow, seed=1)
    own = torch.cat([shadow.log_probs(images) for images, _, _ in digits.batches('train', 500)]).double()
    own, honest = (x - x.mean(1, keepdim=True) for x in (own, honest.double()))
    cosines = (honest/honest.norm(dim=1, keepdim=True)) @ (own/own.norm(dim=1, keepdim=True)).T
    power = honest.norm(dim=1)/own.norm(dim=1)[cosines.argmax(1)]
    assert cosines.amax(1).min() > 1 - 1e-9 and .5 <= power.min() < .6 and 1.8 < power.max() <= 2
    assert sorted(cosines.argmax(1).bincount(minlength=600).unique().tolist()) == [4]


def test_the_thief_has_random_numbers_of_his_own(digits):
    victim = protects('mad')
    thief = thief_for(10, seed=victim.seed, victim=victim)
    assert thief.seed != victim.seed and thief.believed == ('mad', victim.options, victim.recipe)
    mine, theirs = (release('mad', surrogate='cnn_tiny', num_classes=10, image_shape=(1, 8, 8), seed=s) for s in (thief.seed, victim.seed))
    assert not torch.equal(next(mine.surrogate.parameters()), next(theirs.surrogate.parameters()))


def test_whom_the_thief_believes():
    victim = make_run('digits', 'cnn_tiny', 'rsp', teacher=make_run('digits', 'cnn_tiny', 'ce'), magnitude=.3)
    def believed(**options): return thief_for(10, victim=victim, **options).believed[:2]
    assert believed() == believed(against='rsp') == ('rsp', dict(victim.options)) and victim.options['magnitude'] == .3
    assert believed(against='st') == ('st', release.options('st')) and believed(against='identity')[0] == 'identity'


# State, and runs.

def _learner(folder, against='rsp'):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return Learner('thief', net, thief_for(10, against=against, **FAST), Recipe(epochs=3, batch_size=64, lr=.01), folder=folder)


def teacher(images): return (images.flatten(1) @ torch.linspace(-1, 1, 640).view(64, 10)).log_softmax(1)


def test_a_checkpoint_holds_what_was_learnt(tmp_path, digits, monkeypatch):
    "A run stopped inside an epoch and taken up again ends as one that was never stopped, and trains no second shadow."
    whole, cut, again = (_learner(tmp_path/place) for place in ('whole', 'cut', 'cut'))
    train([whole], digits, 0, teacher, CPU)
    observe = cut.objective.observe
    class Stop(Exception): "Ends a run from outside."
    def watched(*args):
        if cut.epoch == 1 and cut.done == 4: raise Stop
        return observe(*args)
    cut.objective.observe = watched
    inside = Settings(device='cpu', inside_seconds=0)
    with pytest.raises(Stop): train([cut], digits, 0, teacher, inside)
    monkeypatch.delattr('cmim_repro.attacks.recovery.fit_restorer') # would fail if it were called
    train([again], digits, 0, teacher, CPU)
    for part in ('objective', 'model'):
        for name, value in getattr(whole, part).state_dict().items(): assert torch.equal(value, getattr(again, part).state_dict()[name]), name


def test_alone_and_in_company_the_same_numbers(digits):
    alone, one, other = _learner(None), _learner(None), _learner(None, 'st')
    train([alone], digits, 0, teacher, CPU)
    train([other, one], digits, 0, teacher, CPU)
    assert torch.equal(one.model[1].weight, alone.model[1].weight) and not torch.equal(other.model[1].weight, alone.model[1].weight)
    plain = _learner(None, 'identity')
    train([plain], digits, 0, teacher, CPU)
    assert not torch.equal(plain.model[1].weight, alone.model[1].weight)


def test_learning_leaves_the_random_numbers_alone(digits):
    thief = thief_for(10, against='st', **FAST)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    thief.before_step(None, digits, None)
    assert torch.equal(torch.rand(3), expected)


def test_as_runs_in_a_store(tmp_path):
    common = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': {'per_class': 20, 'test_per_class': 10, 'held_out': .2}}
    victim, store = make_run('digits', 'cnn_tiny', 'ce', **common), Store(tmp_path)
    arms = [make_run('digits', 'cnn_tiny', name, teacher=victim, **common) for name in ('st', 'apgp')]
    thieves = [make_run('digits', 'cnn_tiny', 'recovery', teacher=arm, **common, **FAST) for arm in [victim, *arms]]
    plain = make_run('digits', 'cnn_tiny', 'kd', teacher=victim, **common)
    plan = Plan.of([*thieves, plain]).check()
    assert execute(plan, store, CPU) == [] and all(map(store.finished, plan.runs))
    data = load_data(victim)
    made = [make_method(run, data) for run in thieves]
    assert [method.believed[0] for method in made] == ['identity', 'st', 'apgp'] and made[2].believed[2] == arms[1].recipe
    answers = [released(answers_of(run, store, data), data, 'test') for run in (thieves[0], plain)]
    torch.testing.assert_close(*answers) # the null arm as a run


def test_a_table_can_ask_for_it():
    [task] = narrowed(profile('quick'), data_sets='digit_pairs', defenses='mad', attacks='recovery').tasks
    run = attacked(task, 'recovery', 'cnn_tiny', protected(task, 'mad', 'cnn_medium', 1))
    own = operations(run)
    assert run.teacher.options['surrogate'] == 'cnn_small' and 0 < own['shadow'] < 3*own['training']
    choices = attack.note('recovery', 'tuned')
    assert len(choices) == len({str(choice) for choice in choices}) == len(EPSILONS)
    for choice in choices: attack('recovery', **choice)
    assert label('recovery') == 'Recovery' and 'recovery' not in ATTACKS


@pytest.mark.parametrize('options, message', [
    ({'weight': 1.1}, 'weight is 1.1; it must be a number from 0 up to 1'), ({'temperature': 0}, 'temperature is 0'),
    ({'against': 'rps'}, "Unknown release to undo 'rps'; accepted: victim, "), ({'shadow': 'cnn'}, "Unknown network 'cnn'"),
    ({'shadow_epochs': 0}, 'shadow_epochs is 0'), ({'steps': 1.5}, 'steps is 1.5'), ({'against': 'st', 'hidden': 0, 'C': 4}, 'hidden is 0'),
    ({'against': 'st'}, 'num_classes is None')])
def test_options_out_of_range_are_one_clear_sentence(options, message):
    with pytest.raises(Invalid, match=message): thief_for(**{'C': None, **options})


def test_a_plan_is_checked_before_anything_is_trained():
    victim = protects('rsp')
    def check(**options): return Plan.of([make_run('digits', 'cnn_tiny', 'recovery', teacher=victim, **options)]).check()
    check(against='st')
    with pytest.raises(Invalid, match="Unknown release to undo 'rps'"): check(against='rps')


def test_a_thief_who_has_learnt_nothing_says_so():
    thief = thief_for(4, against='st')
    with pytest.raises(Invalid, match='Nothing was learnt yet about the release'):
        thief(torch.zeros(2, 4), torch.full((2, 4), .25).log(), torch.tensor([0, 1]))
