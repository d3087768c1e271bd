"""Cores are those that a process may use, not those of the machine: affinity, containers, jobs, one function everywhere."""
import os
import re
from pathlib import Path

import pytest

from cmim_repro.core import usable_cores

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('group, files, cores', [
    ('0::/', {'cpu.max': '300000 100000'}, 3), ('0::/', {'cpu.max': 'max 100000'}, 64), ('0::/a/b', {'a/cpu.max': '250000 100000', 'a/b/cpu.max': 'max 100000'}, 2),
    ('0::/a', {'a/cpu.max': '20000 100000'}, 1), ('4:cpu,cpuacct:/job', {'cpu/job/cpu.cfs_quota_us': '400000', 'cpu/job/cpu.cfs_period_us': '100000'}, 4),
    ('4:cpu,cpuacct:/job', {'cpu/job/cpu.cfs_quota_us': '-1', 'cpu/job/cpu.cfs_period_us': '100000'}, 64), ('nonsense', {'cpu.max': 'x'}, 64)], ids=str)
def test_limits_of_control_groups(tmp_path, monkeypatch, group, files, cores):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: range(64), raising=False)
    for name, text in {'proc/self/cgroup': group, **{f'sys/fs/cgroup/{name}': text for name, text in files.items()}}.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text + '\n', encoding='utf-8')
    assert usable_cores(tmp_path) == cores


def test_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 3}, raising=False)
    assert usable_cores(tmp_path) == 2


def test_nobody_asks_for_the_cores_of_the_machine():
    "Nor starts as many threads as there are."
    for path in (ROOT/'cmim_repro').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        if path.name != 'core.py' or path.parent.name != 'cmim_repro': assert 'cpu_count' not in text, path
        assert not re.search(r'PoolExecutor\(\)', text), path
