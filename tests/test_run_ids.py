"""The runs of every table and figure are those that they were: a change of code never trains a finished one again."""
import csv
from importlib import import_module
from pathlib import Path

import pytest

from cmim_repro.experiments.profiles import profile
from cmim_repro.experiments.runs import Plan

GOLDEN = Path(__file__).parent/'golden'/'run_ids.csv'
NAMES = [f'table{n}' for n in range(1, 11)] + [f'figure{n}' for n in range(1, 6)]
PLACES = [(name, size) for size in ('quick', 'mini', 'paper') for name in NAMES] + [('beyond1', 'quick'), ('beyond2', 'quick')]


def golden(name, profile_name):
    with open(GOLDEN, newline='') as file:
        return {line['id'] for line in csv.DictReader(file) if line['profile'] == profile_name
                and name in line['exhibits'].split()}


@pytest.mark.parametrize('name, profile_name', PLACES)
def test_the_plan_has_the_runs_that_it_had(name, profile_name):
    entries = import_module(f'cmim_repro.exhibits.{name}').entries(profile(profile_name))
    assert {run.id for run in Plan.of([e.run for e in entries]).runs} == golden(name, profile_name)
