"Any registered data set is a task in any profile: with networks that suit it, a plan, an estimate, and runs."
import pytest

from cmim_repro.core import Invalid
from cmim_repro.experiments.cost import estimate
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.profiles import PROFILES, attacked, narrowed, profile, protected, smoothed
from cmim_repro.experiments.runs import Plan
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.tasks import data_sets, task_for
from cmim_repro.lab.data.core import Size, dataset, size_of
from cmim_repro.lab.models.core import sketch
from cmim_repro.lab.training import Settings

CPU = Settings(device='cpu')


@pytest.fixture(params=[None, Size(1_438, 359, 10, (1, 8, 8))], ids=['without a size', 'with a size'])
def stripes(request, monkeypatch):
    "A data set that nothing else knows about, with one option, as a stranger's notebook would register it."
    dataset.names()
    monkeypatch.setattr(dataset, '_entries', dict(dataset._entries))
    notes = {'size': request.param} if request.param else {}

    @dataset.register('stripes', context=('device',), **notes)
    def stripes(held_out=0., device='cpu'): return dataset('digits', held_out=held_out, per_class=20, device=device)
    return 'stripes'


def small_plan(chosen):
    "One teacher of each kind and its students, for every task."
    runs = []
    for task in chosen.tasks:
        network, student = task.pairs[0]
        for defense in ('ce', 'st', 'cmim'):
            teacher = protected(task, defense, network, 0)
            runs += [attacked(task, method, student, teacher) for method in ('kd', 'knockoff')]
        runs.append(smoothed(task, student, task.epsilons[0], 0))
    return Plan.of(runs).check()


@pytest.mark.parametrize('name', PROFILES)
def test_a_strangers_data_set_has_a_task_a_plan_and_an_estimate(stripes, name, tmp_path):
    chosen = narrowed(profile(name), data_sets=stripes)
    [task] = chosen.tasks
    assert task.data == stripes and set(task.data_options) <= {'held_out'}
    for network in task.pairs[0]: assert sketch(network, num_classes=10, image_shape=(1, 8, 8))
    found = estimate(small_plan(chosen), Store(tmp_path), CPU)
    assert set(found.kinds['basis']) == {'stated'} and (found.kinds['hours'] > 0).all()
    assert narrowed(profile(name), data_sets=stripes,
                    networks='resnet8:cnn_tiny').tasks[0].pairs == (('resnet8', 'cnn_tiny'),)


def test_a_strangers_data_set_runs(stripes, tmp_path):
    plan, store = small_plan(narrowed(profile('smoke'), data_sets=stripes)), Store(tmp_path)
    assert execute(plan, store, CPU) == []
    assert all(store.result(run)['accuracy'] > 0 for run in plan.runs)


@pytest.mark.parametrize('name', PROFILES)
@pytest.mark.parametrize('data', [name for name in data_sets() if name != 'folder']) # whose images are the reader's: test_folder.py
def test_every_data_set_has_a_task_in_every_profile(data, name):
    task = task_for(name, data)
    size = size_of(data, task.data_options)
    for network in {network for pair in task.pairs for network in pair}:
        assert sketch(network, num_classes=size.classes, image_shape=size.image_shape), network
    if name != 'paper': assert size.classes <= 20 and size.held_out


def test_a_profiles_own_data_sets_come_first_and_keep_their_tasks():
    both = narrowed(profile('paper'), data_sets='digits, imagenet')
    assert [task.data for task in both.tasks] == ['imagenet', 'digits']
    assert both.tasks[0] == profile('paper').tasks[2] and both.tasks[1].pairs == (('resnet20', 'resnet8'),)


def test_what_is_no_task_gets_a_sentence():
    with pytest.raises(Invalid, match="Unknown data set 'cifar10'; accepted: cifar100"):
        narrowed(profile('quick'), data_sets='cifar10')


def images_of(run, *splits):
    data = dataset(run.data, **run.data_options)
    return {image.numpy().tobytes() for split in splits
            for image in data.pictures(data.take(split, range(data.size(split))))}


@pytest.mark.parametrize('data', ['digits', 'digit_pairs'])
def test_a_thief_has_a_part_of_the_owners_images_and_holds_out_what_the_teacher_has_not_seen(data, tmp_path):
    [task] = narrowed(profile('smoke'), data_sets=data, overrides='thief_images=.5').tasks
    [whole] = narrowed(profile('smoke'), data_sets=data).tasks
    teacher = protected(task, 'ce', task.pairs[0][0], 0)
    student, alone = attacked(task, 'kd', 'cnn_tiny', teacher), smoothed(task, 'cnn_tiny', .1, 0)
    assert teacher == protected(whole, 'ce', whole.pairs[0][0], 0)
    assert student.data_options == alone.data_options == {**teacher.data_options, 'per_class': 10}
    classes = size_of(data, task.data_options).classes
    held, own = images_of(student, 'held_out'), images_of(student, 'train')
    assert len(held) == classes and len(own) == 9*classes and not held & images_of(teacher, 'train')
    assert held | own < images_of(teacher, 'train', 'held_out')
    assert images_of(student, 'test') == images_of(teacher, 'test')
    store = Store(tmp_path)
    assert execute(Plan.of([student, alone]), store, CPU) == [] and store.result(student)['accuracy'] > 0


def test_a_data_set_without_a_choice_of_images_has_no_thief(stripes):
    with pytest.raises(Invalid, match='thief_images is 0.5, but stripes has no option per_class'):
        narrowed(profile('smoke'), data_sets=stripes, overrides='thief_images=.5')
