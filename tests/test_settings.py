"""How a run is executed changes its numbers by rounding only, or not at all; what changes more belongs to the run."""
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from cmim_repro.defenses.core import objective
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.workers import compute
from cmim_repro.lab.data.core import dataset
from cmim_repro.lab.models.core import model
from cmim_repro.lab.training import Learner, Recipe, Settings, initialised, train

PLAIN = Settings(device='cpu', checkpoint_seconds=0)
OTHER = {'device': 'auto', 'channels_last': False, 'compile': True, 'capture': False, 'lanes': 1, 'tf32': False, 'threads': 2, 'checkpoint_seconds': 1e9, 'inside_seconds': 0.}
SAME_BITS = {'device', 'capture', 'lanes', 'tf32', 'checkpoint_seconds', 'inside_seconds'} # on a CPU
RECIPE = Recipe(epochs=2, batch_size=32, lr=.05, schedule='constant')
DATA = {'per_class': 8, 'test_per_class': 5}


def trained(settings=PLAIN, recipe=RECIPE, folder=None):
    "Weights and buffers of a network with batch normalisation after five steps in float64, so that rounding stays small."
    data = dataset('digits', **DATA)
    network = initialised(lambda: model('cnn_small', num_classes=10, image_shape=(1, 8, 8)), 0)
    one = Learner('one', network, objective('cmim', weight=1., num_classes=10, train_labels=data.labels('train'), count=3), recipe, folder=folder)
    train([one], data, 0, settings=settings)
    return {name: value.double() for name, value in network.state_dict().items()}


@pytest.mark.parametrize('name', [f.name for f in fields(Settings)])
def test_no_setting_changes_more_than_rounding(name, tmp_path):
    if name == 'device' and torch.cuda.is_available(): pytest.skip('auto would be the GPU')
    plain, other = trained(folder=tmp_path/'plain'), trained(replace(PLAIN, **{name: OTHER[name]}), folder=tmp_path/'other')
    for key, value in plain.items():
        if name in SAME_BITS: assert torch.equal(value, other[key]), key
        else: torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f'{key}: {text}')


def test_what_changes_more_is_part_of_the_run():
    "The size of a forward pass, which batch normalisation sees."
    whole, parts = trained(), trained(recipe=replace(RECIPE, micro_batch=8))
    assert max((whole[key] - parts[key]).abs().max() for key in whole) > 1e-3
    assert make_run('digits', 'cnn_tiny', 'ce', recipe=RECIPE).id != make_run('digits', 'cnn_tiny', 'ce', recipe=replace(RECIPE, micro_batch=8)).id
    with pytest.raises(TypeError, match='micro_batch'): Settings(micro_batch=8)


def test_any_number_of_workers_gives_the_same_bits(tmp_path):
    "Without OMP_NUM_THREADS, as people call it: one process, which could use every core, and two."
    teacher = make_run('digits', 'cnn_medium', 'ce', recipe=RECIPE, data_options=DATA)
    plan = Plan.of([make_run('digits', 'cnn_small', 'kd', recipe=RECIPE, data_options=DATA, teacher=teacher)])
    code = """
import sys, torch
from cmim_repro.experiments.runs import run_from_dict, Plan
from cmim_repro.experiments.store import Store
from cmim_repro.experiments.workers import compute
from cmim_repro.lab.training import Settings
import json
torch.set_num_threads(3)
plan = Plan.of([run_from_dict(json.loads(sys.argv[1]))])
compute(plan, Store(sys.argv[2]), '', int(sys.argv[3]), Settings(device='cpu'))
assert torch.get_num_threads() == 3
"""
    environment = {name: value for name, value in os.environ.items() if name not in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    found = []
    for workers in '12':
        folder = tmp_path/workers
        done = subprocess.run([sys.executable, '-c', code, plan.runs[-1].json, str(folder), workers], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        store = Store(folder)
        assert {store.result(run)['threads'] for run in plan.runs} == {1}
        found.append([{name: value.clone() for name, value in store.tensors(run, 'weights.safetensors').items()} for run in plan.runs])
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_with_other_settings_and_says_so(tmp_path):
    "Stopped after an epoch, and started again with other settings."
    class Stop(Exception): pass
    def stop(done, total, text):
        if 'epoch 1' in text: raise Stop
    run = make_run('digits', 'cnn_tiny', 'ls', recipe=RECIPE, data_options=DATA)
    store, plan = Store(tmp_path), Plan.of([run])
    with pytest.raises(Stop): execute(plan, store, PLAIN, progress=stop)
    execute(plan, store, replace(PLAIN, channels_last=False))
    found = store.result(run)
    assert found['settings']['channels_last'] is False and [part['settings']['channels_last'] for part in found['earlier']] == [True]
    whole = Store(tmp_path/'whole')
    compute(plan, whole, settings=PLAIN)
    assert 'earlier' not in whole.result(run)
