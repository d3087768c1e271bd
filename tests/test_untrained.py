"The null arm that was never trained: as a run in a store, as a teacher, and in a plan."
import pytest
import torch
from torch.testing import assert_close

from cmim_repro.defenses.core import objective, release
from cmim_repro.experiments.cost import operations
from cmim_repro.experiments.execution import answers_of, execute, load_data, make_network, released
from cmim_repro.experiments.profiles import narrowed, profile, protected
from cmim_repro.experiments.runs import Plan, make_run, run_from_dict
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.paper import label

DATA = {'per_class': 20, 'test_per_class': 10, 'held_out': .2}
COMMON = {'recipe': Recipe(epochs=2, batch_size=32, lr=.05), 'data_options': DATA}
UNTRAINED = make_run('digits', 'cnn_tiny', 'untrained', **COMMON)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A store with an untrained network, two releases of it and a student of each."
    store, arms = Store(tmp_path_factory.mktemp('untrained')), [UNTRAINED]
    arms += [make_run('digits', 'cnn_tiny', name, teacher=UNTRAINED, data_options=DATA) for name in ('centroid', 'st')]
    plan = Plan.of([make_run('digits', 'cnn_tiny', 'kd', teacher=arm, **COMMON) for arm in arms]).check()
    assert execute(plan, store, Settings(device='cpu')) == [] and all(map(store.finished, plan.runs))
    return store


def test_its_weights_are_those_with_which_every_training_begins(done):
    data = load_data(UNTRAINED)
    start = make_network(make_run('digits', 'cnn_tiny', 'ce', **COMMON), data).state_dict()
    kept = done.tensors(UNTRAINED, 'weights.safetensors')
    assert set(kept) == set(start) and all(torch.equal(kept[name], value) for name, value in start.items())


def test_it_is_measured_like_every_other_teacher(done):
    data, result = load_data(UNTRAINED), done.result(UNTRAINED)
    answers, labels = done.log_probs(UNTRAINED)
    assert_close(answers, released(answers_of(UNTRAINED, done, data), data, 'test'))
    assert torch.equal(labels, data.labels('test'))
    assert result['accuracy'] == (answers.argmax(1) == labels).double().mean().item() < .4
    assert answers.exp().amax(1).mean() < .3 and answers.std(0).min() > 0 # unsure of all, but no constant
    assert {'held_out_accuracy', 'train_accuracy', 'seconds', 'finished'} <= set(result)
    assert not (done.folder(UNTRAINED)/'metrics.jsonl').exists()


def test_only_network_data_and_seed_make_another_run():
    def run(network='cnn_tiny', **changes): return make_run('digits', network, 'untrained', **{**COMMON, **changes})
    assert {run(recipe=recipe) for recipe in (None, Recipe(epochs=7), Recipe(precision='bf16'))} == {UNTRAINED}
    others = run(seed=1), run('cnn_small'), run(data_options={**DATA, 'per_class': 10})
    assert len({UNTRAINED, *others}) == 4
    assert run_from_dict(UNTRAINED.to_dict()) == UNTRAINED and UNTRAINED.depth == 0


def test_nothing_else_stops_training():
    for name in objective.names():
        teacher = UNTRAINED if objective.entry(name).needs_teacher else None
        if name in release.names(): continue
        assert make_run('digits', 'cnn_tiny', name, teacher=teacher).trains == (name not in ('untrained', 'own')), name


def test_a_table_can_ask_for_it():
    [task] = narrowed(profile('quick'), data_sets='digits', defenses='ce, untrained', overrides='epochs=3').tasks
    run = protected(task, 'untrained', 'cnn_medium', 2)
    assert (run.teacher, run.recipe, run.seed, run.trains) == (None, Recipe(), 2, False)
    assert set(operations(run)) == {'answers'} and label('untrained') == 'Untrained' and objective.note('untrained', 'null')
