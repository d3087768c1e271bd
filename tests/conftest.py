"""Shared by all tests: the smoke profile, one thread a process, and CUDA tests skipped where there is no GPU."""
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('CMIM_PROFILE', 'smoke')

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if 'cuda' in item.keywords: item.add_marker(pytest.mark.skip(reason='no CUDA device on this machine'))
