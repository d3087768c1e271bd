"""A run that is killed with SIGKILL and started again ends with the same bytes as one that was left alone."""
import json
import random
import signal
import subprocess
import sys

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


MOMENTS = [(0, 3), (0, 9), (1, 2), (2, 7)] # a run of the plan, and how many of its epochs are done: in the teacher, and in the students beside each other
DOOMED = """
import os, signal, sys, threading
from cmim_repro.experiments.execution import execute, read_plan
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Settings
plan, store, moment, delay = sys.argv[1:]
def progress(done, total, text):
    if text == moment: threading.Timer(float(delay), os.kill, (os.getpid(), signal.SIGKILL)).start()
execute(read_plan(plan), Store(store), Settings(device='cpu', checkpoint_seconds=0., inside_seconds=0.), progress=progress)
"""


def test_killed_and_resumed_is_bit_identical(undisturbed, tmp_path):
    "A process kills itself a random moment after an epoch; its own clock runs, so it does not matter how busy the machine is."
    finish, dice = command(tmp_path, PLAN), random.Random(0)
    for which, epochs in MOMENTS:
        moment = [f'{PLAN.runs[which].name}, epoch {epochs}', str(dice.uniform(0, .05))]
        doomed = subprocess.run([sys.executable, '-c', DOOMED, str(tmp_path/'plan.json'), str(tmp_path/'store'), *moment], capture_output=True, text=True)
        assert doomed.returncode == -signal.SIGKILL, (moment, doomed.stderr[-1000:])
    subprocess.run(finish, check=True, capture_output=True)
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
