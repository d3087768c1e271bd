"""A run that is killed with SIGKILL and started again ends with the same bytes as one that was left alone."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings

COMMON = {'recipe': Recipe(epochs=10, batch_size=32, lr=.05, schedule='cosine'), 'data_options': {'per_class': 60}}
TEACHER = make_run('digits', 'cnn_small', 'cmim', weight=1., **COMMON)
PLAN = Plan.of([make_run('digits', 'cnn_tiny', method, teacher=TEACHER, **COMMON) for method in ('kd', 'mkd')])
SETTINGS = Settings(device='cpu', checkpoint_seconds=0., inside_seconds=0.)


def command(folder, plan):
    (folder/'plan.json').write_text(json.dumps([run.to_dict() for run in plan.runs]))
    return [sys.executable, '-m', 'cmim_repro.experiments.execution', str(folder/'plan.json'), '--store', str(folder/'store'),
            '--device', 'cpu', '--settings', 'checkpoint_seconds=0, inside_seconds=0']


def finished_files(folder, run):
    place = Store(folder/'store').folder(run)
    return {name: (place/name).read_bytes() for name in ('metrics.jsonl', 'weights.safetensors')}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    assert execute(PLAN, Store(folder/'store'), SETTINGS) == []
    return {run.id: finished_files(folder, run) for run in PLAN.runs}


def lines(store, run):
    try: return len((store.folder(run)/'metrics.jsonl').read_text().splitlines())
    except FileNotFoundError: return 0


def reached(store, run, epochs): return lines(store, run) >= epochs


def kill_when(process, reached, delay):
    "SIGKILL the process `delay` seconds after reached() is true; False if it ended first."
    while process.poll() is None and not reached(): time.sleep(.002)
    time.sleep(delay)
    if process.poll() is not None: return False
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


MOMENTS = [(0, 3), (0, 9), (1, 2), (2, 7)] # a run of the plan, and how many of its epochs are done: in the teacher, and in the students beside each other


def test_killed_and_resumed_is_bit_identical(undisturbed, tmp_path):
    store, dice, killed = Store(tmp_path/'store'), random.Random(0), 0
    for which, epochs in MOMENTS:
        process = subprocess.Popen(command(tmp_path, PLAN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        killed += kill_when(process, partial(reached, store, PLAN.runs[which], epochs), dice.uniform(0, .1))
    assert killed == len(MOMENTS)
    subprocess.run(command(tmp_path, PLAN), check=True, capture_output=True)
    for run in PLAN.runs: assert finished_files(tmp_path, run) == undisturbed[run.id], run.name


@pytest.mark.timeout(240, func_only=True)
def test_killed_between_the_last_checkpoint_and_the_result(undisturbed, tmp_path, monkeypatch):
    store, plan, settings = Store(tmp_path/'store'), Plan.of([TEACHER]), Settings(device='cpu', checkpoint_seconds=0.)
    def killed(self, run, result): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Store, 'finish', killed)
        with pytest.raises(KeyboardInterrupt): execute(plan, store, settings)
    assert store.result(TEACHER) is None and lines(store, TEACHER) == 10
    assert execute(plan, store, settings) == [] and store.result(TEACHER)['accuracy'] > 0
    assert finished_files(tmp_path, TEACHER) == undisturbed[TEACHER.id]


def test_alone_and_in_a_cohort_are_bit_identical(undisturbed, tmp_path):
    for run in PLAN.runs[1:]:
        assert execute(Plan.of([run]), Store(tmp_path/'store'), SETTINGS) == []
        assert finished_files(tmp_path, run) == undisturbed[run.id], run.name


def test_two_processes_share_the_work(tmp_path):
    plan = Plan.of([make_run('digits', 'cnn_tiny', 'ce', seed=seed, **COMMON) for seed in range(6)])
    children = [subprocess.Popen([*command(tmp_path, plan), '--limit', '1'], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    store = Store(tmp_path/'store')
    assert all(store.result(run)['accuracy'] > 0 for run in plan.runs)
    assert all(len(store.metrics(run)) == COMMON['recipe'].epochs for run in plan.runs), outputs
