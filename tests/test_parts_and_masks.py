"""Mends in the code behind every number that change none: a last part of one image, the umask, broken archives."""
import hashlib
import io
import os
import stat
import tarfile
import zipfile

import pytest
import torch

from cmim_repro.core import Unusable, _mask, atomic_write
from cmim_repro.experiments.execution import execute
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.data.core import fetch
from cmim_repro.lab.training import Batch, Recipe, Settings, _parts


def sizes(count, size):
    batch = Batch(torch.zeros(count, 1), torch.zeros(count), torch.arange(count), None, 0, 0, 0)
    return [len(images) for _, images, _ in _parts(batch, size)]


@pytest.mark.parametrize('count, size, parts', [(30, 29, [30]), (30, 10, [10, 10, 10]), (31, 10, [10, 10, 11]), (32, 10, [10, 10, 10, 2]), (7, 3, [3, 4]), (1, 8, [1])])
def test_a_last_part_of_one_image_joins(count, size, parts): assert sizes(count, size) == parts


def test_a_batch_that_leaves_one_image_trains(tmp_path):
    run = make_run('digits', 'cnn_tiny', 'ce', recipe=Recipe(epochs=1, batch_size=30, micro_batch=29), data_options={'per_class': 3})
    store = Store(tmp_path)
    assert execute(Plan.of([run]), store, Settings(device='cpu')) == [] and store.finished(run)


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_the_umask_is_respected(tmp_path, mask):
    before = os.umask(mask)
    try:
        _mask.cache_clear()
        atomic_write(tmp_path/'file', 'text')
        assert stat.S_IMODE((tmp_path/'file').stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)
        _mask.cache_clear()


def archive(kind):
    "Bytes of an archive: broken, or with a member that would be put outside."
    buffer = io.BytesIO()
    if kind == 'outside.tar':
        with tarfile.open(fileobj=buffer, mode='w') as found: found.addfile(tarfile.TarInfo('../outside'))
    if kind == 'cut.zip':
        with zipfile.ZipFile(buffer, 'w') as found: found.writestr('a', 'b'*1000)
    return buffer.getvalue()[:900] if kind == 'cut.zip' else buffer.getvalue() or b'no archive'


@pytest.mark.parametrize('kind', ['outside.tar', 'cut.zip', 'none.zip', 'none.tar', 'none.tar.gz'])
def test_archives_that_are_broken_or_lead_outside(tmp_path, kind):
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/kind).write_bytes(archive(kind)) # it lies there already, with the sum that it should have
    with pytest.raises(Unusable, match=f'{kind} could not be fetched') as said:
        fetch(f'http://127.0.0.1:9/{kind}', kind, hashlib.md5(archive(kind)).hexdigest(), tmp_path/'in', lambda: False)
    assert '\n' not in str(said.value) and not (tmp_path/'outside').exists()
