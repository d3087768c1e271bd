"""Several processes train as one does: the same losses for every objective and every bank, one checkpoint, and a resume."""
import json
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cmim_repro.attacks.core import attack
from cmim_repro.defenses.core import objective
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.processes import end_together
from cmim_repro.lab.training import Learner, Recipe, Settings, initialised, train

DIGITS = {'per_class': 32, 'test_per_class': 10}
RECIPE = Recipe(epochs=2, batch_size=40, lr=.05)
TEACHERS = {'ce': {}, 'ls': {}, **{f'cmim {bank}': {'centroids': bank, 'weight': 1., 'count': 5, 'every': 2} for bank in ('memory', 'resample', 'batch')}}
STUDENTS = ('kd', 'mkd', 'dkd', 'dist', 'avg', 'knockoff', 'standardised', 'amplified', 'extra')


def network(seed):
    "Without batch normalisation, whose statistics are each process's own."
    return initialised(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)), seed)


def learner(name, data, recipe):
    method = name.split()[0]
    registry = objective if name in TEACHERS else attack
    facts = {'num_classes': 10, 'train_labels': data.labels('train'), 'seed': 3}
    loss = registry(method, **TEACHERS.get(name, {}), **{k: v for k, v in facts.items() if k in registry.context(method)})
    return Learner(name, network(5), loss, recipe)


def histories(micro_batch=0):
    data, black_box = dataset('digits', **DIGITS), network(9)
    def teacher(images): return black_box(images).log_softmax(1)
    recipe = replace(RECIPE, micro_batch=micro_batch)
    learners = [learner(name, data, recipe) for name in (*TEACHERS, *STUDENTS)]
    train(learners, data, 0, teacher, Settings(device='cpu'))
    return {one.name: (one.history, [p.detach() for p in one.model.parameters()]) for one in learners}


def _child(rank, world, place, micro_batch):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{place}/meeting', rank=rank, world_size=world)
    torch.save(histories(micro_batch), place/f'{rank}.pt')
    end_together()


@pytest.mark.parametrize('world, micro_batch', [(2, 0), pytest.param(3, 0, marks=pytest.mark.slow), (2, 7)])
def test_processes_give_the_losses_of_one(tmp_path, world, micro_batch):
    "Shares of 20 and 20, of 13, 13 and 14, and shares in parts of 7 images."
    mp.spawn(_child, (world, tmp_path, micro_batch), world)
    one = histories()
    for rank in range(world):
        for name, (history, weights) in torch.load(tmp_path/f'{rank}.pt').items():
            for line, expected in zip(history, one[name][0], strict=True): assert line == pytest.approx(expected, rel=2e-4), (name, rank)
            torch.testing.assert_close(weights, one[name][1], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f'{name}: {text}')


COMMON = {'recipe': Recipe(epochs=6, batch_size=32, lr=.05, schedule='cosine', processes=2), 'data_options': {'per_class': 60}}
TEACHER = make_run('digits', 'cnn_small', 'cmim', weight=1., **COMMON)
PLAN = Plan.of([make_run('digits', 'cnn_tiny', method, teacher=TEACHER, **COMMON) for method in ('kd', 'mkd')])


def command(folder, processes):
    (folder/'plan.json').write_text(json.dumps([run.to_dict() for run in PLAN.runs]))
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else [sys.executable]
    return [*start, '-m', 'cmim_repro.experiments.execution', str(folder/'plan.json'), '--store', str(folder/'store'), '--device', 'cpu',
            '--settings', 'checkpoint_seconds=0, inside_seconds=0']


def test_the_number_of_processes_belongs_to_the_run(tmp_path):
    "Batch normalisation sees the share of one process: a run for two is not trained by one."
    refused = subprocess.run(command(tmp_path, 1), capture_output=True, text=True)
    assert refused.returncode == 2 and not Store(tmp_path/'store').runs()
    assert refused.stderr.strip().splitlines()[-1] == (f"error: {TEACHER.name} is to be trained by 2 processes together, and here is 1; start it with the executor "
                                                       "'torchrun:2', or change the override processes.")
    alone = make_run('digits', 'cnn_small', 'cmim', weight=1., **{**COMMON, 'recipe': replace(COMMON['recipe'], processes=1)})
    assert alone.id != TEACHER.id


@pytest.mark.slow
def test_torchrun_is_killed_and_goes_on(tmp_path):
    store = Store(tmp_path/'store')
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
    group = subprocess.Popen(command(tmp_path, 2), **quiet)
    deadline = time.monotonic() + 400
    while len(store.metrics(TEACHER)) < 2 and group.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    assert group.poll() is None, group.stderr.read()[-2000:]
    launcher = psutil.Process(group.pid)
    family = [launcher, *launcher.children(recursive=True)] # torchrun puts its workers into sessions of their own
    for process in family: process.kill()
    psutil.wait_procs(family)
    assert store.result(TEACHER) is None and (store.folder(TEACHER)/'checkpoint.pt').exists()
    before = store.metrics(TEACHER)
    done = subprocess.run(command(tmp_path, 2), **quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert store.metrics(TEACHER)[:len(before)] == before
    assert store.result(TEACHER)['processes'] == 2 and store.result(TEACHER)['accuracy'] > .8
    for run in PLAN.runs: assert len(store.metrics(run)) == 6 and store.result(run)


@pytest.mark.slow
def test_torchrun_computes_a_plan_and_each_file_is_written_once(tmp_path):
    done = subprocess.run(command(tmp_path, 2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    store = Store(tmp_path/'store')
    for run in PLAN.runs:
        assert [line['epoch'] for line in store.metrics(run)] == list(range(1, 7))
        assert store.result(run)['processes'] == 2
    assert store.log_probs(TEACHER)[0].exp().sum(1).sub(1).abs().max() < 1e-5
    kept, labels = store.log_probs(TEACHER)
    assert labels.equal(dataset('digits', **COMMON['data_options']).labels('test')) and (kept.argmax(1) == labels).double().mean() > .8
