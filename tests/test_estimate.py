"""The estimate counts what the plan has, names its basis, and prefers what was measured."""
import pandas as pd
import pytest

from cmim_repro.core import Invalid
from cmim_repro.exhibits.table1 import entries as table1_entries
from cmim_repro.experiments.cost import RATES, estimate, multiply_adds, operations, read_throughput
from cmim_repro.experiments.profiles import narrowed, profile
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import size_of
from cmim_repro.lab.models.core import describe, sketch
from cmim_repro.lab.training import Recipe, Settings

CPU = Settings(device='cpu')


@pytest.fixture(scope='module')
def paper(tmp_path_factory):
    plan = Plan.of([e.run for e in table1_entries(profile('paper'))])
    return plan, estimate(plan, Store(tmp_path_factory.mktemp('empty')), CPU)


def test_counts_are_the_plans(paper):
    plan, found = paper
    assert list(found.data_sets['data']) == ['cifar100', 'tinyimagenet', 'imagenet', 'all']
    for data, row in found.data_sets.set_index('data').iterrows():
        runs = [run for run in plan.runs if data in (run.data, 'all')]
        cohorts = [cohort for cohort in plan.cohorts() if data in (cohort[0].data, 'all')]
        depth = 1 + max(run.depth for run in runs)
        assert (row['runs'], row['cohorts'], row['depth']) == (len(runs), len(cohorts), depth)
    for _, row in found.depths.iterrows():
        runs = [run for run in plan.runs if run.data == row['data'] and run.depth == row['depth']]
        assert row['runs'] == len(runs) == row['trainings'] + row['releases'] + row['attacks']
        waits = {run.teacher.id for run in runs if run.teacher}
        assert row['waits for'] == (f"{len(waits)} runs of depth {row['depth'] - 1}" if waits else 'nothing')
    assert found.kinds['runs'].sum() == len(plan.runs)


def test_nothing_measured_is_said_to_be_stated(paper):
    _, found = paper
    assert set(found.kinds['basis']) == {'stated'} and (found.kinds['hours'] > 0).all()
    assert (found.data_sets['measured'] == '0%').all()
    assert 'GPU hours' in found.note and 'assumed' in found.note and RATES['a100'].device in found.note
    assert 'imagenet_resnet34' in repr(found) and 'imagenet_resnet34' in found._repr_html_()


@pytest.mark.parametrize('data, network, shape, classes',
                         [('cifar100', 'vgg16', (3, 32, 32), 100), ('tinyimagenet', 'resnet18', (3, 64, 64), 200),
                                                           ('imagenet', 'imagenet_resnet18', (3, 224, 224), 1000)])
def test_operations_of_a_known_network(data, network, shape, classes):
    run, size = make_run(data, network, 'ce', recipe=Recipe(epochs=7),
                         data_options={'held_out': .1}), size_of(data, {'held_out': .1})
    madds = int(describe(sketch(network, num_classes=classes, image_shape=shape), shape)['multiply-adds'].iloc[-1])
    found = operations(run)
    assert multiply_adds(network, {}, size) == madds and size.train + size.held_out == size_of(data, {}).train
    assert found == {'training': 3*2*madds*size.train*7, 'evaluation': 2*madds*(size.test + size.held_out)*7,
                     'answers': 2*madds*(size.test + size.held_out)}
    later = 0 if data == 'imagenet' else size.train # too many answers to keep
    assert operations(run, needed=True)['answers'] == 2*madds*(size.test + size.held_out + later)


def test_downloaded_weights_are_not_trained():
    found = operations(make_run('imagenet', 'imagenet_resnet18', 'ce', model_options={'pretrained': True}), needed=True)
    assert set(found) == {'answers'} and found['answers'] == 2*multiply_adds('imagenet_resnet18', {},
                                                                             size_of('imagenet', {}))*50_000


def test_every_earlier_stage_of_a_chain_is_asked():
    teacher, size = make_run('cifar100', 'vgg16', 'ce'), size_of('cifar100', {})
    third = make_run('cifar100', 'vgg11', 'scm', teacher=teacher, stages=3, imitate='mean')
    assert operations(third)['teacher'] == 2*2*multiply_adds('vgg11', {}, size)*size.train*third.recipe.epochs


def test_subsets_of_the_data_are_respected():
    whole, part = size_of('tinyimagenet', {}), size_of('tinyimagenet', {'classes': 50, 'per_class': 40,
                                                                        'test_per_class': 10, 'held_out': .25})
    assert (whole.train, whole.test, whole.classes) == (100_000, 10_000, 200)
    assert (part.train, part.held_out, part.test, part.classes) == (50*30, 50*10, 500, 50)
    assert size_of('imagenet', {'classes': ['n01440764', 'n01443537'], 'image_size': 64}).image_shape == (3, 64, 64)


def test_a_teacher_is_counted_once_a_cohort(tmp_path):
    teacher = make_run('cifar100', 'vgg16', 'ce')
    def hours(methods):
        kinds = estimate(Plan.of([make_run('cifar100', 'vgg11', m, teacher=teacher) for m in methods]), Store(tmp_path),
                         CPU, throughput=1).kinds
        return kinds.loc[kinds['method'].isin(methods), 'hours'].sum()
    one, two = hours(['kd']), hours(['kd', 'dist'])
    shared = operations(make_run('cifar100', 'vgg11', 'kd', teacher=teacher))['teacher']/1e12/3600
    assert two == pytest.approx(2*one - shared) and shared > 0


def test_measured_wins_over_throughput_and_stated(tmp_path):
    store, table = Store(tmp_path/'store'), tmp_path/'speed.csv'
    plan = Plan.of([make_run('cifar100', 'vgg11', 'ce', seed=seed) for seed in range(2)])
    def basis(throughput=''):
        [row] = estimate(plan, store, CPU, throughput).kinds.to_dict('records')
        return row['basis'], row['hours each'], row['hours left']
    assert basis()[0] == 'stated'
    pd.DataFrame([{'network': 'vgg11', 'method': m, 'precision': 'float32', 'images/s': s, 'image size': 32,
                   'classes': 100}
                  for m, s in (('ce', 1000.), ('cmim', 500.))]).to_csv(table, index=False)
    name, each, _ = basis(str(table))
    speed = read_throughput(table)['vgg11', 'ce', 'float32']
    assert name == 'throughput' and each == pytest.approx(sum(operations(plan.runs[0]).values())/speed/3600)
    assert each == pytest.approx(50_000*200/1000/3600, rel=.1) # training alone, by images a second
    cmim = Plan.of([make_run('cifar100', 'vgg11', 'cmim')])
    assert estimate(cmim, store, CPU, str(table)).kinds['hours'].iloc[0] == pytest.approx(2*each)
    store.start(plan.runs[0])
    store.finish(plan.runs[0], {'seconds': 7200., 'device_name': 'a test'})
    assert basis() == basis(str(table)) == ('measured', pytest.approx(2.), pytest.approx(2.))
    assert 'a test' in estimate(plan, store, CPU).note


def test_a_run_that_differs_is_no_measurement(tmp_path):
    store, wanted = Store(tmp_path), make_run('digits', 'cnn_tiny', 'ce')
    for other in (make_run('digits', 'cnn_tiny', 'ce', data_options={'per_class': 5}),
                  make_run('digits', 'cnn_small', 'ce'),
                  make_run('digits', 'cnn_tiny', 'ls'),
                  make_run('digits', 'cnn_tiny', 'ce', recipe=Recipe(batch_size=8))):
        store.start(other)
        store.finish(other, {'seconds': 1.})
    assert list(estimate(Plan.of([wanted]), store, CPU).kinds['basis']) == ['stated']


def test_the_longest_chain_follows_the_teachers(tmp_path):
    store = Store(tmp_path)
    teacher = make_run('digits', 'cnn_small', 'ce')
    released = make_run('digits', 'cnn_small', 'st', teacher=teacher)
    students = [make_run('digits', 'cnn_tiny', 'kd', teacher=t) for t in (teacher, released)]
    plan = Plan.of(students)
    found = estimate(plan, store, CPU)
    hours = found.kinds.set_index(['depth', 'method'])['hours']
    assert found.data_sets['longest chain'].iloc[0] == pytest.approx(hours[0, 'ce'] + hours[1, 'st'] + hours[2, 'kd'])
    for run, seconds in ((teacher, 60.), (released, 30.)): store.start(run); store.finish(run, {'seconds': seconds})
    left = estimate(plan, store, CPU)
    assert left.data_sets['longest chain'].iloc[0] == pytest.approx(hours[1, 'kd']) == pytest.approx(hours[2, 'kd'],
                                                                                                     rel=.01)
    assert left.data_sets['hours left'].iloc[0] < left.data_sets['hours'].iloc[0]


def test_bad_throughput_gets_a_sentence(tmp_path):
    plan, store = Plan.of([make_run('digits', 'cnn_tiny', 'ce')]), Store(tmp_path/'store')
    with pytest.raises(Invalid, match='throughput is 0.0; it must be a number above 0'): estimate(plan, store, CPU, 0)
    (tmp_path/'odd.csv').write_text('network,method\nvgg11,ce\n')
    with pytest.raises(Invalid, match="odd.csv has no column 'precision'"):
        estimate(plan, store, CPU, str(tmp_path/'odd.csv'))
    with pytest.raises(Invalid, match="throughput is 'quick'; it must be one of cpu, a100"):
        estimate(plan, store, CPU, 'quick')


def test_small_profiles_are_meant_for_this_processor(tmp_path):
    chosen = narrowed(profile('smoke'), attacks='kd', defenses='cmim')
    found = estimate(Plan.of([e.run for e in table1_entries(chosen)]), Store(tmp_path), CPU)
    assert 'CPU hours' in found.note and RATES['cpu'].device in found.note
    assert list(found.data_sets['data']) == ['digits']


def test_a_network_that_does_not_take_the_images_is_refused_in_the_plan(tmp_path):
    plan = Plan.of([make_run('tinyimagenet', 'resnet18', 'ce'), make_run('tinyimagenet', 'vgg16', 'ce')])
    with pytest.raises(Invalid, match=r"tinyimagenet: image_shape is \(3, 64, 64\); network 'vgg16' takes"):
        estimate(plan, Store(tmp_path), CPU)
    unknown = make_run('folder', 'vgg16', 'ce', data_options={'path': str(tmp_path)})
    assert list(estimate(Plan.of([unknown]), Store(tmp_path), CPU).kinds['basis']) == ['unknown']
