"""Stores that one may only read, and file systems without locks: tables come, and whoever would compute is told why not."""
import errno
import os
import shutil

import pytest

from cmim_repro.core import Unusable
from cmim_repro.exhibits import figure3
from cmim_repro.experiments.execution import execute, main
from cmim_repro.experiments.runs import Plan, make_run
from cmim_repro.experiments.store import Store
from cmim_repro.lab.training import Recipe, Settings
from cmim_repro.report.exhibit import Exhibit

COMMON = {'recipe': Recipe(epochs=1, batch_size=32), 'data_options': {'per_class': 20}}
TEACHER = make_run('digits', 'cnn_tiny', 'ce', **COMMON)
CPU = Settings(device='cpu')


@pytest.fixture
def read_only(monkeypatch):
    "Folders below this one refuse what would change them, as a file system that is mounted so does, for root too."
    def refuse(folder):
        access, mkdir, replace = os.access, os.mkdir, os.replace
        def here(path): return str(path).startswith(str(folder))
        def deny(do):
            def done(path, *more, **options):
                if here(path): raise OSError(errno.EROFS, 'Read-only file system', str(path))
                return do(path, *more, **options)
            return done
        monkeypatch.setattr('os.access', lambda path, mode, **options: not (here(path) and mode & os.W_OK) and access(path, mode, **options))
        monkeypatch.setattr('os.mkdir', deny(mkdir))
        monkeypatch.setattr('os.replace', deny(replace))
    return refuse


def test_tables_and_figures_of_a_store_that_one_may_only_read(tmp_path, read_only):
    asked = {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'figures'), 'epochs': '1', 'seeds': '1', 'workers': '1'}
    Exhibit('figure3', asked).run(figure3.entries)
    shutil.rmtree(tmp_path/'store'/'locks')
    read_only(tmp_path/'store')
    again = Exhibit('figure3', asked)
    again.run(figure3.entries)
    assert all(again.store.finished(e.run) for e in again.entries) and len(again.frame)
    more = Exhibit('figure3', {**asked, 'seeds': '2'})
    with pytest.raises(Unusable, match='The store .* cannot be written .*Read-only file system.*; name another folder'): more.run(figure3.entries)


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, errno.EACCES])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys, number):
    def fails(path, *_): raise OSError(number, os.strerror(number))
    store = Store(tmp_path/'store')
    if number == errno.EACCES: monkeypatch.setattr('filelock._unix.os.open', fails) # another user's file
    else: monkeypatch.setattr('fcntl.flock', fails)
    with pytest.raises(Unusable, match=f'{TEACHER.id}.lock cannot be locked .*; choose a store of your own') as said: execute(Plan.of([TEACHER]), store, CPU)
    assert os.strerror(number) in str(said.value) and not (tmp_path/'store'/TEACHER.name).exists()


def test_a_folder_that_is_no_store(tmp_path, capsys):
    (tmp_path/'file').touch()
    (tmp_path/'plan.json').write_text('[]', encoding='utf-8')
    for name in ('file', 'file/below', 'a\0b'):
        assert main([str(tmp_path/'plan.json'), '--store', str(tmp_path/name)]) == 2
        assert 'cannot be written' in capsys.readouterr().err
